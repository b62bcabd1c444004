"""Measuring rows in turns: every row once a round, so that a machine that slows down slows all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from captionserve_server.bench.processes import family_memory_mib
from captionserve_server.bench.rows import Options, Peer, Row, TokenIds


@dataclass(frozen=True)
class Sample:
    """One run of one row.

    Attributes:
        row: the row's label.
        round: which round, from 0.
        images_per_second: throughput.
        latency_p50_ms: median time of an image.
        latency_p99_ms: 99th percentile.
        tokens: generated tokens per image, mean.
        same_captions: share of images captioned token for token as by the first row with as many
            beams.
        memory_mib: memory of the system's processes afterwards, as if there were no others.
        stages_ms: milliseconds per image by stage, where the system tells.
    """

    row: str
    round: int
    images_per_second: float
    latency_p50_ms: float
    latency_p99_ms: float
    tokens: float
    same_captions: float
    memory_mib: float
    stages_ms: dict[str, float]


@dataclass
class Measurements:
    """What was measured.

    Attributes:
        samples: one for each run.
        failures: why a system could not be measured to the end, by its name.
    """

    samples: list[Sample] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


class Rounds:
    """Runs rows of systems that are running."""

    def __init__(
        self,
        peers: Mapping[str, Peer],
        images: int,
        lengths: Options,
        measurements: Measurements,
        progress: Callable[[str], None],
    ) -> None:
        """Prepare.

        Args:
            peers: the running systems by name.
            images: images that a run captions at least.
            lengths: min_length and max_length; empty for natural lengths.
            measurements: takes the samples, and why systems failed.
            progress: told what begins.
        """
        self._peers = dict(peers)
        self._images = images
        self._lengths = lengths
        self._measurements = measurements
        self._progress = progress
        self._expected: dict[int, list[TokenIds]] = {}

    def measure(self, rows: Sequence[Row], rounds: int, before_round: Callable[[], None]) -> None:
        """Warm every system up, then run every row once a round, beginning with another each time.

        Args:
            rows: what to run; those of systems that do not run, or run no longer, are left out.
            rounds: how many.
            before_round: called as each round begins.
        """
        for name, peer in list(self._peers.items()):
            # A system's largest load lays its memory.
            own = (row for row in rows if row.peer == name)
            largest = max(own, key=lambda row: row.load.at_once * row.num_beams)
            with self._noted(largest, "warming up"):
                peer.run(largest.load.at_once, largest.load, self._options(largest))
        for number in range(rounds):
            before_round()
            first = number % len(rows)
            for row in [*rows[first:], *rows[:first]]:
                if row.peer in self._peers:
                    with self._noted(row, f"round {number + 1} of {rounds}"):
                        self._measurements.samples.append(self._sample(row, number))

    @contextmanager
    def _noted(self, row: Row, what: str) -> Iterator[None]:
        """Say what begins. A system that fails is not run again, and costs no other its figures."""
        self._progress(f"{what}: {row.label}")
        try:
            yield
        except Exception as error:  # Each system fails in its own way.
            self._measurements.failures[row.peer] = f"{row.label}: {error}"
            del self._peers[row.peer]

    def _options(self, row: Row) -> Options:
        return {"num_beams": row.num_beams} | self._lengths

    def _sample(self, row: Row, number: int) -> Sample:
        peer = self._peers[row.peer]
        # Every load comes round twice or more.
        images = max(self._images, 2 * row.load.at_once)
        run = peer.run(images, row.load, self._options(row))
        expected = self._expected.setdefault(row.num_beams, run.token_ids)
        # Rows with larger loads have more images; those that both have are compared.
        same = [own == other for own, other in zip(run.token_ids, expected, strict=False)]
        median, p99 = np.percentile(run.latencies, (50, 99))
        return Sample(
            row=row.label,
            round=number,
            images_per_second=images / run.seconds,
            latency_p50_ms=1e3 * float(median),
            latency_p99_ms=1e3 * float(p99),
            tokens=statistics.fmean(map(len, run.token_ids)),
            same_captions=statistics.fmean(same),
            memory_mib=family_memory_mib(peer.pid),
            stages_ms=run.stages_ms,
        )
