"""A system that captions, and how a load of images is put on it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from captionserve_server.bench.peers.in_bulk import captioned_in_bulk
from captionserve_server.bulk.captioners import Captioner

TokenIds = tuple[int, ...]
Options = dict[str, int]
"""num_beams, and min_length and max_length where lengths are forced, as generate() names them."""

IN_BULK = "in bulk"

CALL_SECONDS = 600.0
"""How long one call may take: longer than any that is waited for."""


@dataclass(frozen=True)
class Load:
    """How many images a system is given at once.

    Attributes:
        at_once: how many.
        word: what they are to the system: a "batch", calls "at once" or "in flight", or files
            "in bulk", where the system says how many it takes at once.
        streams: how many of the calls are streamed, word by word.
    """

    at_once: int
    word: str
    streams: int = 0

    def __str__(self) -> str:
        """As it stands in a row's label."""
        if self.word == "batch":
            return f"batch {self.at_once}"
        if self.word == IN_BULK:
            return IN_BULK
        if self.streams:
            return f"{self.streams} streams and {self.at_once - self.streams} calls {self.word}"
        return f"{self.at_once} {self.word}"


@dataclass(frozen=True)
class Run:
    """What became of a load of images.

    Attributes:
        seconds: from the first image to the last caption.
        latencies: seconds that each image took; those of a batch took as long as it.
        token_ids: each image's generated tokens, the end token included.
        stages_ms: milliseconds per image by stage, where the system tells.
    """

    seconds: float
    latencies: list[float]
    token_ids: list[TokenIds]
    stages_ms: dict[str, float]


class System(ABC):
    """What captions images, whichever way."""

    @abstractmethod
    def caption(self, files: list[bytes], options: Options, streamed: bool) -> list[TokenIds]:
        """The tokens of each JPEG file of a batch; a system of calls gets one file a call."""

    def captioner(self) -> Captioner:
        """What captions for it in bulk."""
        raise NotImplementedError(f"{type(self).__name__} is not asked in bulk")

    def stage_seconds(self) -> dict[str, float]:
        """The time spent by stage, since the system began; empty if it does not tell."""
        return {}

    def run(self, files: list[bytes], load: Load, options: Options) -> Run:
        """Caption all files: in batches, by calls of which so many are in flight, or in bulk."""
        before = self.stage_seconds()
        if load.word == IN_BULK:
            seconds, token_ids = captioned_in_bulk(self.captioner(), files, options)
            # They are one batch: nobody sees a caption before the last one.
            latencies = [seconds] * len(files)
        else:
            begin = time.perf_counter()
            latencies, token_ids = self._captioned(files, load, options)
            seconds = time.perf_counter() - begin
        after = self.stage_seconds()
        # A stage is not told of before it has first begun.
        stages = {name: 1e3 * (after[name] - before.get(name, 0.0)) / len(files) for name in after}
        return Run(seconds, latencies, token_ids, stages)

    def _captioned(
        self, files: list[bytes], load: Load, options: Options
    ) -> tuple[list[float], list[TokenIds]]:
        """Each file's seconds and tokens."""
        in_batches = load.word == "batch"
        size, calls = (load.at_once, 1) if in_batches else (1, load.at_once)
        batches = [files[first : first + size] for first in range(0, len(files), size)]

        def timed(number: int, batch: list[bytes]) -> tuple[float, list[TokenIds]]:
            begin = time.perf_counter()
            captions = self.caption(batch, options, number % calls < load.streams)
            return time.perf_counter() - begin, captions

        with ThreadPoolExecutor(calls) as pool:
            # Batches stay in this thread, where programs have them: in another one than the first,
            # OpenMP's threads wait in another way.
            in_order = map if in_batches else pool.map
            answers = list(in_order(timed, range(len(batches)), batches))
        return (
            [latency for latency, captions in answers for _ in captions],
            [caption for _, captions in answers for caption in captions],
        )


@dataclass(frozen=True)
class Peer:
    """A system that is running.

    Attributes:
        pid: its process; with its descendants, all that it consists of.
        run: the system's.
    """

    pid: int
    run: Callable[[list[bytes], Load, Options], Run]
