"""Measuring rows in turns: every row once a round, so that a machine that slows down slows all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from captionserve_server.bench.processes import family_cpu_seconds, family_memory
from captionserve_server.bench.rows import Decoding, Peer, Row, Run, TokenIds

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One run of one row.

    Attributes:
        row: the row's label.
        round: which round, from 0.
        images: captioned images.
        seconds: from the first image to the last caption.
        latency_p50_ms: median time of an image.
        latency_p99_ms: 99th percentile.
        tokens: generated tokens per image, mean.
        same_captions: share of images captioned token for token as by the first row with as many
            beams.
        memory_mib: memory of the system's processes afterwards, as if there were no others.
        peak_rss_mib: the sum of their highest memory so far.
        cpu_seconds: processor time that they used.
        others_cpu_seconds: processor time that the other systems used meanwhile.
        stages_ms: milliseconds per image by stage, where the system tells.
    """

    row: str
    round: int
    images: int
    seconds: float
    latency_p50_ms: float
    latency_p99_ms: float
    tokens: float
    same_captions: float
    memory_mib: float
    peak_rss_mib: float
    cpu_seconds: float
    others_cpu_seconds: float
    stages_ms: dict[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        """Throughput."""
        return self.images / self.seconds


@dataclass
class Measurements:
    """What was measured.

    Attributes:
        samples: one for each run.
        failures: why a system could not be measured to the end, by its name.
    """

    samples: list[Sample] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def turns(rows: Sequence[Row], round_number: int) -> list[Row]:
    """The rows in this round's order: each round begins with another one."""
    first = round_number % len(rows)
    return [*rows[first:], *rows[:first]]


def images_of(row: Row, at_least: int) -> int:
    """Images that a run of a row captions: every load comes round twice or more."""
    return max(at_least, 2 * row.load)


class Rounds:
    """Runs rows of systems that are running."""

    def __init__(
        self, peers: Mapping[str, Peer], images: int, forced_tokens: int | None, progress: Progress
    ) -> None:
        """Prepare.

        Args:
            peers: the running systems by name.
            images: images that a run captions at least.
            forced_tokens: length of every caption; None for natural lengths.
            progress: told what begins.
        """
        self._peers = dict(peers)
        self._images = images
        self._forced_tokens = forced_tokens
        self._progress = progress
        self._expected: dict[int, list[TokenIds]] = {}

    def measure(
        self,
        rows: Sequence[Row],
        rounds: int,
        measurements: Measurements,
        before_round: Callable[[], None],
    ) -> None:
        """Warm every system up, then run every row once a round.

        Args:
            rows: what to run; those of systems that do not run are left out.
            rounds: how many.
            measurements: takes the samples, and why systems failed.
            before_round: called as each round begins.
        """
        self._warm_up(rows, measurements)
        for number in range(rounds):
            before_round()
            for row in turns(rows, number):
                if row.peer in self._peers:
                    self._progress(f"round {number + 1} of {rounds}: {row.label}")
                    with self._failure_noted(row, measurements):
                        measurements.samples.append(self._sample(row, number))

    def _warm_up(self, rows: Sequence[Row], measurements: Measurements) -> None:
        """Let each system take its largest load once, which lays its memory."""
        for name in list(self._peers):
            own = [row for row in rows if row.peer == name]
            largest = max(own, key=lambda row: row.load * row.num_beams)
            self._progress(f"warming up: {largest.label}")
            with self._failure_noted(largest, measurements):
                self._run(largest, largest.load)

    @contextmanager
    def _failure_noted(self, row: Row, measurements: Measurements) -> Iterator[None]:
        """A system that fails is not run again; it must not cost the others' figures."""
        try:
            yield
        except Exception as error:  # Each system fails in its own way.
            measurements.failures[row.peer] = f"{row.label}: {error}"
            del self._peers[row.peer]

    def _run(self, row: Row, images: int) -> Run:
        decoding = Decoding(row.num_beams, self._forced_tokens)
        return self._peers[row.peer].run(images, row.load, decoding)

    def _sample(self, row: Row, round_number: int) -> Sample:
        own, others = self._cpu_seconds(row.peer)
        run = self._run(row, images_of(row, self._images))
        own_after, others_after = self._cpu_seconds(row.peer)
        memory = family_memory(self._peers[row.peer].pid)
        expected = self._expected.setdefault(row.num_beams, run.token_ids)
        median, p99 = np.percentile(run.latencies, (50, 99))
        return Sample(
            row=row.label,
            round=round_number,
            images=len(run.latencies),
            seconds=run.seconds,
            latency_p50_ms=1e3 * float(median),
            latency_p99_ms=1e3 * float(p99),
            tokens=statistics.fmean(map(len, run.token_ids)),
            same_captions=share_equal(run.token_ids, expected),
            memory_mib=memory.mib,
            peak_rss_mib=memory.peak_rss_mib,
            cpu_seconds=own_after - own,
            others_cpu_seconds=others_after - others,
            stages_ms=run.stages,
        )

    def _cpu_seconds(self, peer: str) -> tuple[float, float]:
        """Processor time used so far by a system and by all others."""
        used = {name: family_cpu_seconds(each.pid) for name, each in self._peers.items()}
        return used[peer], sum(seconds for name, seconds in used.items() if name != peer)


def share_equal(captions: Sequence[TokenIds], expected: Sequence[TokenIds]) -> float:
    """The share of captions that are as expected, over the images that both have."""
    pairs = list(zip(captions, expected, strict=False))
    return sum(own == other for own, other in pairs) / len(pairs)
