"""Sequences side by side, for several captions at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.step_model import BoolArray, Float32Array, Int64Array

NEVER = np.float32(-1.0e9)
"""Marks scores that must never win; the value transformers uses, so that ties fall alike."""

_Element = TypeVar("_Element", bound=np.generic)


@dataclass
class Hypotheses:
    """Rows of lanes; the first dims of every array are [lanes, rows].

    Attributes:
        scores: float32; sums of log-probabilities of rows that go on, divided by the length penalty
            for completed ones; NEVER for a placeholder.
        lengths: int64, tokens that count, start token and prefix included.
        ended: bool, whether the row is complete.
        tokens: int64 [lanes, rows, longest], start token and prefix included.
        logprobs: float32 [lanes, rows, longest], of each token; 0 for what was given.
        origins: int64 [lanes, rows, longest], the row of the decoder that chose each token.
    """

    scores: Float32Array
    lengths: Int64Array
    ended: BoolArray
    tokens: Int64Array
    logprobs: Float32Array
    origins: Int64Array

    @classmethod
    def placeholders(cls, lanes: int, rows: int, longest: int) -> Hypotheses:
        """Rows that lose against any real one."""
        shape = (lanes, rows, longest)
        return cls(
            scores=np.full((lanes, rows), NEVER, np.float32),
            lengths=np.zeros((lanes, rows), np.int64),
            ended=np.zeros((lanes, rows), np.bool_),
            tokens=np.zeros(shape, np.int64),
            logprobs=np.zeros(shape, np.float32),
            origins=np.zeros(shape, np.int64),
        )

    def lanes(self, index: Int64Array | BoolArray) -> Hypotheses:
        """The lanes at `index`; a copy."""
        return Hypotheses(**{name: array[index] for name, array in self._arrays()})

    def put(self, index: Int64Array, other: Hypotheses) -> None:
        """Replace the lanes at `index` by the others, in their order."""
        for name, array in self._arrays():
            array[index] = getattr(other, name)

    def pick(self, rows: Int64Array) -> Hypotheses:
        """Each lane's rows at `rows`, [lanes, picked]; a copy."""
        return self.pick_of(np.arange(len(rows)), rows)

    def pick_of(self, lanes: Int64Array, rows: Int64Array) -> Hypotheses:
        """The rows at `rows` of each of some lanes, [chosen] and [chosen, picked]; a copy."""
        index = lanes[:, None], rows
        return Hypotheses(**{name: array[index] for name, array in self._arrays()})

    def beside(self, other: Hypotheses) -> Hypotheses:
        """Each lane's rows, then the other's."""
        return Hypotheses(
            **{
                name: np.concatenate((array, getattr(other, name)), axis=1)
                for name, array in self._arrays()
            }
        )

    def followed_by(self, lanes: Hypotheses) -> Hypotheses:
        """These lanes, then the others; both as long as the longer ones."""
        longest = max(self.tokens.shape[2], lanes.tokens.shape[2])
        other = lanes.stretched(longest)
        return Hypotheses(
            **{
                name: np.concatenate((array, getattr(other, name)))
                for name, array in self.stretched(longest)._arrays()
            }
        )

    def stretched(self, longest: int) -> Hypotheses:
        """The same with room for `longest` tokens."""
        missing = longest - self.tokens.shape[2]
        if not missing:
            return self
        padding = ((0, 0), (0, 0), (0, missing))
        return Hypotheses(
            **{
                name: np.pad(array, padding) if array.ndim == 3 else array
                for name, array in self._arrays()
            }
        )

    def _arrays(self) -> list[tuple[str, NDArray[Any]]]:
        return [(name, getattr(self, name)) for name in _NAMES]


_NAMES = tuple(field.name for field in dataclasses.fields(Hypotheses))


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
