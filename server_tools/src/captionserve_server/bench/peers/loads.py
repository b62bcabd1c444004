"""Putting a load of images on a system: in batches, or in calls of which a number is in flight."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice

from captionserve_server.bench.rows import Load, Options, Run, TokenIds

CALL_SECONDS = 600.0
"""How long one call may take: longer than any that is waited for."""


def run_in_batches(
    caption: Callable[[list[bytes]], list[TokenIds]],
    files: Sequence[bytes],
    images: int,
    load: Load,
) -> Run:
    """Caption so many images, a batch after the other; `files` come round again."""
    waiting = islice(cycle(files), images)
    latencies: list[float] = []
    token_ids: list[TokenIds] = []
    begin = time.perf_counter()
    while batch := list(islice(waiting, load.at_once)):
        batch_begin = time.perf_counter()
        token_ids += caption(batch)
        latencies += [time.perf_counter() - batch_begin] * len(batch)
    return Run(time.perf_counter() - begin, latencies, token_ids)


def run_in_flight(
    caption: Callable[[bytes, bool], TokenIds], files: Sequence[bytes], images: int, load: Load
) -> Run:
    """Caption so many images, each by a call, streamed or not; `files` come round again."""

    def timed(number: int) -> tuple[float, TokenIds]:
        begin = time.perf_counter()
        tokens = caption(files[number % len(files)], number % load.at_once < load.streams)
        return time.perf_counter() - begin, tokens

    begin = time.perf_counter()
    with ThreadPoolExecutor(load.at_once) as pool:
        answers = list(pool.map(timed, range(images)))
    seconds = time.perf_counter() - begin
    return Run(seconds, [latency for latency, _ in answers], [tokens for _, tokens in answers])


@dataclasses.dataclass
class CalledPeer:
    """A system that is running, asked by calls: a Peer.

    Attributes:
        pid: its process.
        versions: of what it is made of.
        caption: gives the token ids of a file, streamed or not; called by many threads.
        files: JPEG files.
        stage_seconds: the time spent since it began, by stage.
    """

    pid: int
    versions: dict[str, str]
    caption: Callable[[bytes, Options, bool], TokenIds]
    files: Sequence[bytes]
    stage_seconds: Callable[[], Mapping[str, float]] = dict

    def run(self, images: int, load: Load, options: Options) -> Run:
        """See Captioner."""
        before = self.stage_seconds()
        run = run_in_flight(
            lambda file, streamed: self.caption(file, options, streamed), self.files, images, load
        )
        return dataclasses.replace(run, stages_ms=stages_ms(before, self.stage_seconds(), images))


def stages_ms(
    before: Mapping[str, float], after: Mapping[str, float], images: int
) -> dict[str, float]:
    """Milliseconds per image by stage, from the seconds spent before and after so many images."""
    return {name: 1e3 * (after[name] - before.get(name, 0.0)) / images for name in after}
