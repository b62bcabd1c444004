"""Greedy search and sampling: every row goes its own way."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.history import DROPPED, FINISHED, LIKELIEST, HistoryStep
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search.base import Choices, Lanes, Search, Vocabulary
from captionserve_server.core.search.hypotheses import (
    is_one_of,
    length_penalised,
    shared_beginning,
)
from captionserve_server.core.step_model import (
    BoolArray,
    Float64Array,
    Int64Array,
)


@dataclass(frozen=True)
class RowwiseLanes(Lanes):
    """Lanes whose rows end one by one.

    Attributes:
        ended: bool [lanes, rows].
    """

    ended: BoolArray


@dataclass(frozen=True)
class RowwiseSearch(Search):
    """Rows that know nothing of each other; subclasses choose each one's next token."""

    lanes: RowwiseLanes

    @property
    def finished(self) -> BoolArray:
        """[lanes], whether every row has ended."""
        ended: BoolArray = self.lanes.ended.all(axis=1)
        return ended

    def captions(self, lane: int) -> list[DecodedCaption]:
        """All rows, best first."""
        return self.best_so_far(lane)

    def best_so_far(self, lane: int) -> list[DecodedCaption]:
        """All rows as they stand, best first."""
        running = self.lanes.running
        lengths = running.lengths[lane] - self.lanes.given[lane]
        if not lengths.min():
            return []
        scores = length_penalised(running.scores[lane], lengths, self.lanes.length_penalty[[lane]])
        order = np.argsort(-scores, kind="stable")
        return [self._caption(running, lane, int(row), float(scores[row])) for row in order]

    def certain_tokens(self, lane: int) -> tuple[int, ...]:
        """What all rows share: with one row, all that there is."""
        given = self.lanes.given[lane]
        running = self.lanes.running
        return shared_beginning(running.tokens[lane, :, given:], running.lengths[lane] - given)

    @classmethod
    def new_lane(cls, vocabulary: Vocabulary, plan: CaptionPlan) -> RowwiseLanes:
        """One lane before its first step."""
        lane = super().new_lane(vocabulary, plan)
        lane.running.scores[:] = 0.0
        return RowwiseLanes(**vars(lane), ended=np.zeros((1, plan.options.rows), np.bool_))

    @abstractmethod
    def _choose(self, choices: Choices) -> Int64Array:
        """The rank of each row's next token among its candidates, [taking, rows]."""

    def _live_rows(self) -> BoolArray:
        live: BoolArray = ~self.lanes.ended
        return live

    def _extended(self, choices: Choices) -> RowwiseSearch:
        lanes, running = self.lanes, self.lanes.running.copy()
        moving = ~lanes.ended[choices.lanes]
        taking, rows = np.nonzero(moving)
        ranks = self._choose(choices)
        candidates = taking, rows, ranks[moving]
        tokens, logprobs = choices.tokens[candidates], choices.logprobs[candidates]
        lane = choices.lanes[taking]
        at, ends = (lane, rows), running.lengths[lane, rows]
        running.tokens[lane, rows, ends] = tokens
        running.logprobs[lane, rows, ends] = logprobs
        running.origins[lane, rows, ends] = choices.origins[moving]
        running.scores[at] += logprobs
        running.lengths[at] += 1
        ended, parents = lanes.ended.copy(), lanes.parents.copy()
        ended[at] = is_one_of(tokens, self.vocabulary.end_ids) | (ends + 1 >= lanes.longest[lane])
        parents[choices.lanes] = choices.origins
        lanes = lanes.with_fields(running=running, ended=ended, parents=parents)
        if lanes.wants_history.any():
            lanes = lanes.with_fields(history=self._remembered(choices, moving, ranks, ended))
        return dataclasses.replace(self, lanes=lanes)

    def _remembered(
        self, choices: Choices, moving: BoolArray, ranks: Int64Array, ended: BoolArray
    ) -> tuple[tuple[HistoryStep, ...], ...]:
        """The lanes' histories with this step: each row's likeliest tokens, and the chosen one.

        Args:
            choices: what might have followed.
            moving: [taking, rows], which rows have taken a token.
            ranks: [taking, rows], which of the candidates that was.
            ended: [lanes, rows], which rows have ended by now.
        """
        longer = list(self.lanes.history)
        for number in np.flatnonzero(self.lanes.wants_history[choices.lanes]).tolist():
            lane = int(choices.lanes[number])
            rows = np.flatnonzero(moving[number])
            chosen = ranks[number, rows]
            told = np.zeros((len(rows), choices.tokens.shape[2]), np.bool_)
            told[:, :LIKELIEST] = True
            told[np.arange(len(rows)), chosen] = True
            told &= choices.logprobs[number, rows] > -np.inf
            at, rank = np.nonzero(told)
            parents = rows[at]
            logprobs = choices.logprobs[number, parents, rank]
            became = np.where(ended[lane, parents], FINISHED, parents)
            step = HistoryStep(
                parents=parents,
                tokens=choices.tokens[number, parents, rank],
                logprobs=logprobs,
                scores=self.lanes.running.scores[lane, parents] + logprobs,
                rows=np.where(rank == chosen[at], became, DROPPED),
                origins=choices.origins[number],
                likeliest_tokens=choices.tokens[number, :, :LIKELIEST].copy(),
                likeliest_logprobs=choices.logprobs[number, :, :LIKELIEST].copy(),
            )
            longer[lane] = (*longer[lane], step)
        return tuple(longer)


@dataclass(frozen=True)
class GreedySearch(RowwiseSearch):
    """The most likely token, each time."""

    def _candidates_per_row(self) -> int:
        return 1

    def _choose(self, choices: Choices) -> Int64Array:
        return np.zeros(choices.origins.shape, np.int64)


@dataclass(frozen=True)
class SamplingLanes(RowwiseLanes):
    """Lanes with their draws.

    Attributes:
        uniforms: float64 [lanes, rows, longest], a number in [0, 1) for each token.
    """

    uniforms: Float64Array


@dataclass(frozen=True)
class SamplingSearch(RowwiseSearch):
    """Tokens drawn from the model's distribution, warped as transformers warps it.

    A row's draws depend on the seed and the row's number only: one uniform number for each token,
    drawn when the caption joins.
    """

    lanes: SamplingLanes

    @classmethod
    def new_lane(cls, vocabulary: Vocabulary, plan: CaptionPlan) -> SamplingLanes:
        """One lane before its first step, with its draws."""
        lane = super().new_lane(vocabulary, plan)
        return SamplingLanes(**vars(lane), uniforms=_uniforms(plan.options)[None])

    def _candidates_per_row(self) -> int:
        size = self.vocabulary.size
        return max(candidates_drawn_from(plan.options, size) for plan in self.lanes.plans)

    def _choose(self, choices: Choices) -> Int64Array:
        options = [self.lanes.plans[lane].options for lane in choices.lanes]
        shares = warped_shares(choices.logprobs.astype(np.float64), options)
        drawn = self.lanes.seen[choices.lanes] - self.lanes.given[choices.lanes]
        draws = self.lanes.uniforms[choices.lanes, :, drawn]
        totals = np.cumsum(shares, axis=2)
        ranks: Int64Array = (totals <= draws[:, :, None] * totals[:, :, -1:]).sum(axis=2)
        # A draw just below 1 may meet the rounded total; the last token with a share is meant.
        last = shares.shape[2] - 1 - np.argmax(shares[:, :, ::-1] > 0, axis=2)
        return np.minimum(ranks, last)


def candidates_drawn_from(options: DecodingOptions, vocabulary_size: int) -> int:
    """How many of the likeliest tokens a draw needs to know."""
    return min(options.top_k or vocabulary_size, vocabulary_size)


def warped_shares(logprobs: Float64Array, options: list[DecodingOptions]) -> Float64Array:
    """What a draw is made from: temperature, then top_k, then top_p, then min_p.

    Args:
        logprobs: [lanes, rows, candidates], descending.
        options: [lanes].

    Returns:
        float64, likewise; the shares of what is left, not summing to 1, 0 for what is not.
    """

    def each(name: str) -> Float64Array:
        values: Float64Array = np.array([getattr(option, name) for option in options], np.float64)
        return values[:, None, None]

    # A row that did not run has no candidates; nothing is drawn from it.
    highest = np.where(np.isneginf(logprobs[:, :, :1]), 0.0, logprobs[:, :, :1])
    shares = np.exp((logprobs - highest) / each("temperature"))
    top_k, top_p = each("top_k"), each("top_p")
    shares = np.where((np.arange(shares.shape[2]) < top_k) | (top_k == 0), shares, 0.0)
    totals = np.maximum(shares.sum(axis=2, keepdims=True), np.finfo(np.float64).tiny)
    likelier = (np.cumsum(shares, axis=2) - shares) / totals
    shares = np.where((likelier < top_p) | (top_p == 1.0), shares, 0.0)
    shares = np.where(shares >= each("min_p") * shares[:, :, :1], shares, 0.0)
    warped: Float64Array = shares
    return warped


def _uniforms(options: DecodingOptions) -> Float64Array:
    """Numbers in [0, 1), float64 [rows, max_length]."""
    seeds: list[list[int] | None] = [
        None if options.seed is None else [options.seed, row] for row in range(options.rows)
    ]
    drawn: Float64Array = np.stack(
        [np.random.default_rng(seed).random(options.max_length) for seed in seeds]
    )
    return drawn
