"""Measuring rows in turns: every row once a round, so that a machine that slows down slows all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice

import numpy as np

from captionserve_server.bench.cost_model import MachineRates
from captionserve_server.bench.peers.system import Peer, Run, TokenIds
from captionserve_server.bench.processes import family_memory_mib
from captionserve_server.bench.report import Figures, Report
from captionserve_server.bench.rows import Row


class Rounds:
    """Runs rows of systems that are running."""

    def __init__(
        self,
        peers: Mapping[str, Peer],
        pictures: Sequence[bytes],
        report: Report,
        progress: Callable[[str], None],
    ) -> None:
        """Prepare.

        Args:
            peers: the running systems by name.
            pictures: JPEG files; a run that captions more begins again with the first.
            report: says what to measure, and takes what was measured and why systems failed.
            progress: told what begins.
        """
        self._peers = dict(peers)
        self._pictures = pictures
        self._report = report
        self._progress = progress
        self._expected: dict[int, list[TokenIds]] = {}

    def measure(self, rows: Sequence[Row], machine: Callable[[], MachineRates]) -> None:
        """Warm every system up, then run every row once a round, beginning with another each time.

        Args:
            rows: what to run; those of systems that do not run, or run no longer, are left out.
            machine: measures the machine; called as each round begins.
        """
        for name in list(self._peers):
            # A system's largest load lays its memory.
            own = (row for row in rows if row.peer == name)
            largest = max(own, key=lambda row: row.load.at_once * row.num_beams)
            with self._noted(largest, "warming up"):
                self._run(largest, largest.load.at_once)
        rounds = self._report.comparison.rounds
        for number in range(rounds):
            self._report.rates.append(machine())
            first = number % len(rows)
            for row in [*rows[first:], *rows[:first]]:
                if row.peer in self._peers:
                    with self._noted(row, f"round {number + 1} of {rounds}"):
                        figures = self._measured(row)
                        self._report.rounds.setdefault(row, []).append(figures)

    @contextmanager
    def _noted(self, row: Row, what: str) -> Iterator[None]:
        """Say what begins. A system that fails is not run again, and costs no other its figures."""
        self._progress(f"{what}: {row.label}")
        try:
            yield
        except Exception as error:  # Each system fails in its own way.
            self._report.failures[row.peer] = f"{row.label}: {error}"
            del self._peers[row.peer]

    def _run(self, row: Row, images: int) -> Run:
        options = {"num_beams": row.num_beams}
        tokens = self._report.comparison.forced_tokens
        if tokens is not None:
            # Lengths count the start token.
            options |= dict.fromkeys(("min_length", "max_length"), tokens + 1)
        files = list(islice(cycle(self._pictures), images))
        return self._peers[row.peer].run(files, row.load, options)

    def _measured(self, row: Row) -> Figures:
        # Every load comes round twice or more.
        images = max(self._report.comparison.images, 2 * row.load.at_once)
        run = self._run(row, images)
        expected = self._expected.setdefault(row.num_beams, run.token_ids)
        # Rows with larger loads have more images; those that both have are compared.
        same = [own == other for own, other in zip(run.token_ids, expected, strict=False)]
        p50, p99 = np.percentile(run.latencies, (50, 99))
        return Figures(
            images_per_second=images / run.seconds,
            latency_p50_ms=1e3 * float(p50),
            latency_p99_ms=1e3 * float(p99),
            tokens=statistics.fmean(map(len, run.token_ids)),
            same_captions=statistics.fmean(same),
            memory_mib=family_memory_mib(self._peers[row.peer].pid),
            stages_ms=run.stages_ms,
        )
