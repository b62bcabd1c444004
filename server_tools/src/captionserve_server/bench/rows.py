"""What is compared: systems under loads, each a row."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from captionserve_server.bench.peers.system import Load, Peer
from captionserve_server.export.precision import Precision


@dataclass(frozen=True)
class PeerPlan:
    """A system that can be started.

    Attributes:
        name: as it stands in reports.
        precision: of its weights.
        loads: the loads to measure.
        start: gives it running, and ends it.
    """

    name: str
    precision: Precision
    loads: Sequence[Load]
    start: Callable[[], AbstractContextManager[Peer]]


@dataclass(frozen=True)
class Row:
    """One line of the report: a system under one load with one number of beams."""

    peer: str
    precision: Precision
    load: Load
    num_beams: int

    @property
    def label(self) -> str:
        """Its name, such as "transformers, batch 8, 4 beams"."""
        return f"{self.peer}, {self.load}, {beams_text(self.num_beams)}"


def beams_text(num_beams: int) -> str:
    """The decoding in words."""
    return "greedy" if num_beams == 1 else f"{num_beams} beams"


def rows_of(
    plans: Iterable[PeerPlan], num_beams: Sequence[int], patterns: Sequence[str]
) -> list[Row]:
    """The rows whose labels, or their beginnings, match one of the shell patterns."""
    rows = [
        Row(plan.name, plan.precision, load, beams)
        for beams in num_beams
        for plan in plans
        for load in plan.loads
    ]
    wanted = [f"{pattern}*" for pattern in patterns]
    return [row for row in rows if any(fnmatch.fnmatchcase(row.label, each) for each in wanted)]
