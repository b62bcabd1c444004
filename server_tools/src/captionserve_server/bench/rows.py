"""What is measured: rows, each a system under one load, and what one run of a row gives."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Decoding:
    """How every system decodes.

    Attributes:
        num_beams: 1 is greedy search.
        forced_tokens: every caption has so many; None lets each end by itself.
    """

    num_beams: int
    forced_tokens: int | None = None

    def as_options(self) -> dict[str, int]:
        """The options as generate() and the client name them; lengths count the start token."""
        options = {"num_beams": self.num_beams}
        if self.forced_tokens is not None:
            length = self.forced_tokens + 1
            options |= {"min_length": length, "max_length": length}
        return options


@dataclass(frozen=True)
class Run:
    """What one run of a row gave.

    Attributes:
        seconds: from the first image to the last caption.
        latencies: seconds that each image took; those of a batch took as long as it.
        token_ids: each image's generated tokens, the end token included.
        stages: milliseconds per image by stage, where the system tells.
    """

    seconds: float
    latencies: list[float]
    token_ids: list[TokenIds]
    stages: dict[str, float] = field(default_factory=dict)


class Peer(Protocol):
    """A system that is running."""

    @property
    def pid(self) -> int:
        """Its process; with its descendants, all that it consists of."""

    @property
    def versions(self) -> dict[str, str]:
        """Versions of what it is made of, by name."""

    def run(self, images: int, load: int, decoding: Decoding) -> Run:
        """Caption the first `images` images, `load` of them at once."""


@dataclass(frozen=True)
class PeerPlan:
    """A system that can be started.

    Attributes:
        name: as it stands in reports.
        precision: "fp32", "int8" or "int4"; another word where no limit is known.
        load_word: what its loads count: "batch" or "in flight".
        loads: the loads to measure.
        start: gives it running, and ends it.
    """

    name: str
    precision: str
    load_word: str
    loads: tuple[int, ...]
    start: Callable[[], AbstractContextManager[Peer]]


@dataclass(frozen=True)
class Row:
    """One line of the report: a system under one load with one decoding."""

    peer: str
    precision: str
    load_word: str
    load: int
    num_beams: int

    @property
    def label(self) -> str:
        """Its name, such as "transformers, batch 8, 4 beams"."""
        parts = ("batch", self.load) if self.load_word == "batch" else (self.load, self.load_word)
        load = " ".join(map(str, parts))
        beams = "greedy" if self.num_beams == 1 else f"{self.num_beams} beams"
        return f"{self.peer}, {load}, {beams}"


def rows_of(
    plans: Iterable[PeerPlan], num_beams: Sequence[int], patterns: Sequence[str]
) -> list[Row]:
    """The rows to measure.

    Args:
        plans: the systems there are.
        num_beams: the numbers of beams to measure.
        patterns: shell patterns of which one must match a row's label, or its beginning.
    """
    rows = [
        Row(plan.name, plan.precision, plan.load_word, load, beams)
        for beams in num_beams
        for plan in plans
        for load in plan.loads
    ]
    return [row for row in rows if _matches(row.label, patterns)]


def _matches(label: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(label, f"{pattern}*") for pattern in patterns)
