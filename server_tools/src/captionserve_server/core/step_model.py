"""What captioning needs from a model: the protocols ImageEncoder and StepModel.

The decoding code knows nothing else of the model, so the same code decodes in Triton, in a process
of one's own, and on a fake in tests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

UInt8Array = NDArray[np.uint8]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

FORBIDDEN = np.float32(np.inf)
"""The value of a penalty that forbids its token."""


class Edit(IntEnum):
    """What an edit does to a score, with the edit's value.

    PENALISE multiplies a negative score by it and divides any other; FORBIDDEN makes it -inf.
    ADD adds it. GROW adds so many times the score's magnitude. FORCE makes the score 0 and those of
    all tokens that are not forced -inf. RENORMALISE lets the row's probabilities sum to 1 after
    the edits; its token and value mean nothing.
    """

    PENALISE = 0
    ADD = 1
    GROW = 2
    FORCE = 3
    RENORMALISE = 4


def no_indices() -> Int64Array:
    """An empty list of rows or tokens."""
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class ScoreEdits:
    """Changes to single tokens' scores before the candidates are chosen.

    They come in runs of one kind of edit; each run acts on what the ones before have left. Of two
    edits of one score in the same run the later one holds.

    Attributes:
        rows: [edits].
        tokens: [edits].
        values: float32 [edits]; of penalties above 0.
        kinds: int64 [edits], of Edit.
    """

    rows: Int64Array = field(default_factory=no_indices)
    tokens: Int64Array = field(default_factory=no_indices)
    values: Float32Array = field(default_factory=lambda: np.zeros(0, np.float32))
    kinds: Int64Array = field(default_factory=no_indices)


@dataclass(frozen=True)
class RowRequests:
    """What is wanted of a step, row by row.

    Attributes:
        tokens: [rows], newest token of each row.
        parents: [rows], which row of the caption's previous step each row continues; 0 at the
            first.
        candidate_counts: [rows], best next tokens wanted; 0 for a row that is only remembered.
        normalise_first: bool [rows], whether edits act on log-probabilities, as in beam search, or
            on logits, whose log-probabilities then follow from the edited ones.
        edits: changed scores.
        probe_rows: [probes], rows of which one token's log-probability is wanted.
        probe_tokens: [probes].
        attention_rows: [attended], rows of which the cross-attention is wanted.
    """

    tokens: Int64Array
    parents: Int64Array
    candidate_counts: Int64Array
    normalise_first: BoolArray
    edits: ScoreEdits = field(default_factory=ScoreEdits)
    probe_rows: Int64Array = field(default_factory=no_indices)
    probe_tokens: Int64Array = field(default_factory=no_indices)
    attention_rows: Int64Array = field(default_factory=no_indices)


@dataclass(frozen=True)
class StepBatch:
    """One decoding step of several captions, each with its own number of rows (live beams).

    Attributes:
        slots: [captions], from `prefill`.
        row_counts: [captions], rows of each caption.
        rows: what is wanted of each row; a caption's rows stand together, in its order.
    """

    slots: Int64Array
    row_counts: Int64Array
    rows: RowRequests


@dataclass(frozen=True)
class StepAnswer:
    """What may follow each row.

    Attributes:
        logprobs: float32, natural log-probabilities of each row's candidates, descending; one row's
            candidate_counts after the other's.
        tokens: int64, likewise.
        probe_logprobs: float32 [probes].
        attention: float32 [attended, image tokens], mean over layers and heads.
    """

    logprobs: Float32Array
    tokens: Int64Array
    probe_logprobs: Float32Array
    attention: Float32Array


@dataclass(frozen=True)
class ForcedRows:
    """Tokens that are there already, as rows of one run: none waits for the one before it.

    Attributes:
        tokens: [rows].
        positions: [rows], that of each token; 0 is the decoder start token.
        sees: bool [rows, rows], whether a row (first dim) is or continues another one.
        probe_rows: [probes], rows of which one next token's log-probability is wanted.
        probe_tokens: [probes].
    """

    tokens: Int64Array
    positions: Int64Array
    sees: BoolArray
    probe_rows: Int64Array
    probe_tokens: Int64Array


class ImageEncoder(Protocol):
    """From pixels to what the decoder looks at."""

    def encode(self, pixels: UInt8Array) -> Float32Array:
        """Encode images.

        Args:
            pixels: uint8 [images, 3, height, width].

        Returns:
            float32 [images, image tokens, encoder width].
        """


class StepModel(Protocol):
    """A decoder that keeps the keys and values of each caption in a slot of its own.

    `prefill` and `free` are done whole or not at all: one that raises has taken or given back
    nothing. After a `step` that raised, the captions in it can only be freed.
    """

    def prefill(self, states: Float32Array) -> Int64Array:
        """Take images in.

        Args:
            states: [images, image tokens, encoder width].

        Returns:
            [images], a slot each; no number is used twice.
        """

    def step(self, batch: StepBatch) -> StepAnswer:
        """Append each row's newest token and return what may follow it."""

    def free(self, slots: Int64Array) -> None:
        """Give slots back; [captions]."""

    def forced_logprobs(self, slot: int | None, rows: ForcedRows) -> Float32Array:
        """Read whole captions in one run; what the slots hold is not changed.

        Args:
            slot: of the image that they are read over; None for no image at all.
            rows: their tokens.

        Returns:
            [probes], natural log-probabilities, the model's own.
        """
