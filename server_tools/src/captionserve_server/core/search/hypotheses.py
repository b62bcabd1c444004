"""Sequences side by side, for several captions at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.search.lanes import LaneRecord
from captionserve_server.core.step_model import (
    BoolArray,
    Float32Array,
    Float64Array,
    Int64Array,
)

_Element = TypeVar("_Element", bound=np.generic)


@dataclass(frozen=True)
class Hypotheses(LaneRecord):
    """Rows of lanes; the first dims of every array are [lanes, rows].

    Attributes:
        scores: float32; sums of log-probabilities of rows that go on, divided by the length penalty
            for completed ones; -inf, which no tokens of a caption can have, where there is none.
        lengths: int64, tokens that count, start token and prefix included.
        tokens: int64 [lanes, rows, longest], start token and prefix included.
        logprobs: float32 [lanes, rows, longest], of each token; 0 for what was given.
        origins: int64 [lanes, rows, longest], the row of the decoder that chose each token.
    """

    scores: Float32Array
    lengths: Int64Array
    tokens: Int64Array
    logprobs: Float32Array
    origins: Int64Array

    @classmethod
    def none(cls, lanes: int, rows: int, longest: int) -> Hypotheses:
        """Room for rows, none of which is there."""
        shape = (lanes, rows, longest)
        return cls(
            scores=np.full((lanes, rows), -np.inf, np.float32),
            lengths=np.zeros((lanes, rows), np.int64),
            tokens=np.zeros(shape, np.int64),
            logprobs=np.zeros(shape, np.float32),
            origins=np.zeros(shape, np.int64),
        )

    @property
    def alive(self) -> BoolArray:
        """[lanes, rows], whether there is a hypothesis in this place."""
        alive: BoolArray = self.scores > -np.inf
        return alive

    def copy(self) -> Hypotheses:
        """The same in arrays of their own, to be written to."""
        return Hypotheses(*(array.copy() for array in vars(self).values()))

    def pick(self, lanes: Int64Array, rows: Int64Array) -> Hypotheses:
        """The rows at `rows` of each of some lanes, [chosen] and [chosen, picked]; a copy."""
        index = lanes[:, None], rows
        return Hypotheses(
            self.scores[index],
            self.lengths[index],
            self.tokens[index],
            self.logprobs[index],
            self.origins[index],
        )

    def extended(
        self,
        lanes: Int64Array,
        rows: Int64Array,
        *,
        scores: Float32Array,
        tokens: Int64Array,
        logprobs: Float32Array,
        origins: Int64Array,
    ) -> Hypotheses:
        """Rows of some lanes with one token more each; a copy.

        Args:
            lanes: [chosen].
            rows: [chosen, picked], the row that each continues.
            scores: [chosen, picked], as are the others; the new sums.
            tokens: the new tokens.
            logprobs: their log-probabilities.
            origins: the decoder's rows that chose them.
        """
        index = lanes[:, None], rows
        lengths = self.lengths[index]
        longer = Hypotheses(
            scores, lengths + 1, self.tokens[index], self.logprobs[index], self.origins[index]
        )
        cells = np.arange(len(lanes))[:, None], np.arange(rows.shape[1]), lengths
        longer.tokens[cells] = tokens
        longer.logprobs[cells] = logprobs
        longer.origins[cells] = origins
        return longer

    def replaced(self, lanes: Int64Array, rows: slice, others: Hypotheses) -> Hypotheses:
        """The same with the others in the place of some rows of some lanes; a copy."""
        if others.scores.shape == self.scores.shape:
            return others
        copy = self.copy()
        for array, new in zip(vars(copy).values(), vars(others).values(), strict=True):
            array[lanes, rows] = new
        return copy

    def beside(self, others: Hypotheses) -> Hypotheses:
        """Each lane's rows, then the others'; a copy."""
        both = zip(vars(self).values(), vars(others).values(), strict=True)
        return Hypotheses(*(np.concatenate(pair, axis=1) for pair in both))


def columns(array: NDArray[_Element], chosen: Int64Array) -> NDArray[_Element]:
    """Each lane's columns at `chosen`, [lanes, chosen].

    np.take_along_axis takes several times as long for so little.
    """
    picked: NDArray[_Element] = array[np.arange(len(chosen))[:, None], chosen]
    return picked


def best(scores: Float32Array, count: int) -> Int64Array:
    """Columns of the `count` highest scores of each lane, descending; [lanes, count].

    The earlier column comes first among equals.
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def is_one_of(tokens: Int64Array, few: Int64Array) -> BoolArray:
    """Whether each token is among `few`; np.isin takes ten times as long for so little."""
    among: BoolArray = (tokens[..., None] == few).any(axis=-1)
    return among


def shared_beginning(rows: Int64Array, lengths: Int64Array) -> tuple[int, ...]:
    """The tokens with which all rows begin; [rows, longest] and [rows]."""
    if not len(rows):
        return ()
    shortest = int(lengths.min())
    same = (rows[:, :shortest] == rows[0, :shortest]).all(axis=0)
    shared = shortest if same.all() else int(np.argmin(same))
    return tuple(rows[0, :shared].tolist())


def length_penalised(
    scores: Float32Array, lengths: Int64Array, exponents: Float64Array
) -> Float32Array:
    """Sums of log-probabilities, each divided by its length ** exponent; shapes broadcast."""
    divisors = (lengths.astype(np.float64) ** exponents).astype(np.float32)
    penalised: Float32Array = scores / divisors
    return penalised
