"""What decoding needs from a decoder: the StepModel protocol.

The decoding code knows nothing else of the model, so the same code decodes through Triton, through
ONNX Runtime in one process, and on a fake in tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]

NO_SLOT = -1
"""Stands for a slot where none was free."""


@dataclass(frozen=True)
class StepBatch:
    """One decoding step of several captions, each with its own number of rows (live beams).

    Attributes:
        slots: [captions], from `prefill`.
        row_counts: [captions], rows of each caption.
        tokens: [rows], newest token of each row; a caption's rows stand together, in its order.
        parents: [rows], which row of the caption's previous step each row continues; 0 at the
        first.
        num_candidates: best next tokens wanted per row.
    """

    slots: Int64Array
    row_counts: Int64Array
    tokens: Int64Array
    parents: Int64Array
    num_candidates: int


@dataclass(frozen=True)
class Candidates:
    """The best next tokens of each row.

    Attributes:
        logprobs: [rows, num_candidates], natural log-probabilities, descending.
        tokens: [rows, num_candidates].
    """

    logprobs: Float32Array
    tokens: Int64Array


class StepModel(Protocol):
    """A decoder that keeps the keys and values of each caption in a slot of its own."""

    def prefill(self, states: Float32Array) -> Int64Array:
        """Take images in.

        Args:
            states: [images, image tokens, encoder width].

        Returns:
            [images], a slot each; NO_SLOT for those that found no room.
        """

    def step(self, batch: StepBatch) -> Candidates:
        """Append each row's newest token and return what may follow it."""

    def free(self, slots: Int64Array) -> None:
        """Give slots back; [captions]."""
