"""How long a request was in each stage on its way to its captions."""

from __future__ import annotations

import time

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


class Timeline:
    """The stages of one request; written by whichever thread has the request.

    Attributes:
        begun: when the first stage began, in seconds since 1970.
        seconds: how long each stage took that has been passed.
    """

    def __init__(self) -> None:
        """Begin with the first stage."""
        self.begun = time.time()
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def passed(self, stage: str) -> None:
        """A stage ends now, and began when the last one ended."""
        now = time.monotonic()
        self.seconds[stage] = now - self._last
        self._last = now
