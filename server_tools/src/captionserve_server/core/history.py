"""What a search has considered at each step, for who wants to see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.step_model import Float32Array, Int64Array

DROPPED = -1
"""The row of a continuation that was not kept."""
FINISHED = -2
"""The row of a continuation that was a complete caption."""

LIKELIEST = 5
"""Tokens that are told of each place of a caption."""


@dataclass(frozen=True)
class HistoryStep:
    """What the rows of one lane might have become at one step.

    Attributes:
        parents: int64 [continuations], the lane's row that each continues.
        tokens: int64, likewise; what follows it.
        logprobs: float32, likewise; of the tokens.
        scores: float32, likewise; their sums.
        rows: int64, likewise; the row that each became, DROPPED or FINISHED.
        origins: int64 [rows], the row of the decoder that each row was.
        likeliest_tokens: int64 [rows, LIKELIEST], or fewer where there are no more.
        likeliest_logprobs: float32, likewise; -inf for what may not follow.
    """

    parents: Int64Array
    tokens: Int64Array
    logprobs: Float32Array
    scores: Float32Array
    rows: Int64Array
    origins: Int64Array
    likeliest_tokens: Int64Array
    likeliest_logprobs: Float32Array

    def followed_by(self, group: HistoryStep) -> HistoryStep:
        """With the continuations of a later group of beams at the same step."""
        return dataclasses.replace(
            self,
            parents=np.concatenate((self.parents, group.parents)),
            tokens=np.concatenate((self.tokens, group.tokens)),
            logprobs=np.concatenate((self.logprobs, group.logprobs)),
            scores=np.concatenate((self.scores, group.scores)),
            rows=np.concatenate((self.rows, group.rows)),
        )


@dataclass(frozen=True)
class CaptionHistory:
    """How a caption came about.

    Attributes:
        steps: of the whole search; the same for all captions of an image.
        path: which continuation of each step is the caption's token there; [tokens].
    """

    steps: tuple[HistoryStep, ...]
    path: tuple[int, ...]

    @property
    def likeliest(self) -> list[tuple[Int64Array, Float32Array]]:
        """Of each token of the caption, what was likeliest there, and its log-probabilities."""
        found = []
        for step, at in zip(self.steps, self.path, strict=False):
            parent = step.parents[at]
            found.append((step.likeliest_tokens[parent], step.likeliest_logprobs[parent]))
        return found


def path_of(
    steps: Sequence[HistoryStep], row: int, tokens: Sequence[int], origins: Sequence[int]
) -> tuple[int, ...]:
    """Which continuation of each step a hypothesis has taken.

    Args:
        steps: at least as many as there are tokens.
        row: where the hypothesis stands among the lane's.
        tokens: those that were generated, at least one.
        origins: the row of the decoder that chose each of them.
    """
    last = len(tokens) - 1
    step = steps[last]
    mine = (step.tokens == tokens[last]) & (step.origins[step.parents] == origins[last])
    places = np.flatnonzero(mine)
    # At the first step all rows are one row of the decoder, and two groups may take one token; then
    # the hypothesis stands at or behind the row that it continues, and before the next one.
    own = int(np.searchsorted(step.parents[places], row, side="right")) - 1
    path = [int(places[max(own, 0)])]
    for step, following in zip(reversed(steps[:last]), reversed(steps[1 : last + 1]), strict=True):
        path.append(int(np.flatnonzero(step.rows == following.parents[path[-1]])[0]))
    return tuple(reversed(path))
