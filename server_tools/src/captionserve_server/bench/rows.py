"""What is compared: systems under loads, each a row, and what one run of a row gives."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

TokenIds = tuple[int, ...]
Options = dict[str, int]
"""num_beams, and min_length and max_length where lengths are forced, as generate() names them."""


@dataclass(frozen=True)
class Load:
    """How many images a system is given at once.

    Attributes:
        at_once: how many.
        word: what they are to the system: "batch", "at once" or "in flight".
        streams: how many of them are streamed, word by word.
    """

    at_once: int
    word: str
    streams: int = 0

    def __str__(self) -> str:
        """As it stands in a row's label."""
        if self.word == "batch":
            return f"batch {self.at_once}"
        if self.streams:
            return f"{self.streams} streams and {self.at_once - self.streams} calls {self.word}"
        return f"{self.at_once} {self.word}"


@dataclass(frozen=True)
class Run:
    """What one run of a row gave.

    Attributes:
        seconds: from the first image to the last caption.
        latencies: seconds that each image took; those of a batch took as long as it.
        token_ids: each image's generated tokens, the end token included.
        stages_ms: milliseconds per image by stage, where the system tells.
    """

    seconds: float
    latencies: list[float]
    token_ids: list[TokenIds]
    stages_ms: dict[str, float] = field(default_factory=dict)


class Captioner(Protocol):
    """What captions.

    Attributes:
        versions: of what it is made of, by name.
    """

    versions: dict[str, str]

    def run(self, images: int, load: Load, options: Options) -> Run:
        """Caption the first `images` images, beginning again after the last there is."""


class Peer(Captioner, Protocol):
    """A system that is running.

    Attributes:
        pid: its process; with its descendants, all that it consists of.
    """

    pid: int


@dataclass(frozen=True)
class PeerPlan:
    """A system that can be started.

    Attributes:
        name: as it stands in reports.
        precision: of its weights; no limit is known for one that cost_model.WEIGHT_BYTES lacks.
        loads: the loads to measure.
        start: gives it running, and ends it.
    """

    name: str
    precision: str
    loads: Sequence[Load]
    start: Callable[[], AbstractContextManager[Peer]]


@dataclass(frozen=True)
class Row:
    """One line of the report: a system under one load with one number of beams."""

    peer: str
    precision: str
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
