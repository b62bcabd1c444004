"""How long a request was in each stage on its way to its captions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple

STAGES = {
    "image_queue": "Waiting for a thread that reads images.",
    "preprocess": "Decoding and resizing the image.",
    "queue": "Waiting for a slot of the decoder.",
    "encode": "The vision encoder, with the images that were encoded together.",
    "prefill": "Projecting the encoder's states.",
    "first_step": "The decoding step that gives the first token, with what ran beside it.",
    "steps": "All further decoding steps.",
    "answer": "Making texts and scores of tokens.",
}
"""The stages in their order, and what each is."""


class Stage(NamedTuple):
    """A stage that has been passed.

    Attributes:
        name: of the stage.
        begin: in seconds since 1970.
        seconds: how long it took.
    """

    name: str
    begin: float
    seconds: float

    @property
    def milliseconds(self) -> float:
        """How long it took."""
        return 1e3 * self.seconds


class Timeline:
    """The stages of one request; written by whichever thread has the request.

    Attributes:
        begun: when the first stage began, in seconds since 1970.
    """

    def __init__(self) -> None:
        """Begin with the first stage."""
        self.begun = time.time()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._last = time.monotonic()

    def passed(self, stage: str) -> None:
        """A stage ends now, and began when the last one ended."""
        now = time.monotonic()
        self._seconds[stage] = now - self._last
        self._last = now

    @property
    def numbers(self) -> list[float]:
        """When it began, and the seconds of each of STAGES; see `stages_of`."""
        return [self.begun, *self._seconds.values()]

    @property
    def stages(self) -> list[Stage]:
        """The stages themselves."""
        return stages_of(self.numbers)


def stages_of(numbers: Iterable[float]) -> list[Stage]:
    """The stages of a timeline's numbers.

    Raises:
        ValueError: if these are not as many as there are.
    """
    begin, *seconds = numbers
    stages = []
    for name, taken in zip(STAGES, seconds, strict=True):
        stages.append(Stage(name, begin, taken))
        begin += taken
    return stages
