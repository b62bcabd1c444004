"""Greedy search and sampling: every row goes its own way."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search.base import (
    Choices,
    Search,
    Vocabulary,
    length_penalised,
    shared_beginning,
)
from captionserve_server.core.step_model import (
    BoolArray,
    Float32Array,
    Float64Array,
    Int64Array,
)


class RowwiseSearch(Search):
    """Rows that know nothing of each other; subclasses choose each one's next token."""

    @property
    def finished(self) -> BoolArray:
        """[lanes], whether every row has ended."""
        ended: BoolArray = self._running.ended.all(axis=1)
        return ended

    def captions(self, lane: int) -> list[DecodedCaption]:
        """All rows, best first."""
        return self.best_so_far(lane)

    def best_so_far(self, lane: int) -> list[DecodedCaption]:
        """All rows as they stand, best first."""
        running = self._running
        lengths = running.lengths[lane] - self._given[lane]
        if not lengths.min():
            return []
        exponent = np.full(self._rows, self._plans[lane].options.length_penalty)
        scores = length_penalised(running.scores[lane], lengths, exponent)
        order = np.argsort(-scores, kind="stable")
        return [self._caption(running, lane, int(row), float(scores[row])) for row in order]

    def certain_tokens(self, lane: int) -> tuple[int, ...]:
        """What all rows share: with one row, all that there is."""
        given = self._given[lane]
        running = self._running
        return shared_beginning(running.tokens[lane, :, given:], running.lengths[lane] - given)

    @abstractmethod
    def _choose(self, choices: Choices) -> Int64Array:
        """The rank of each row's next token among its candidates, [taking, rows]."""

    def join(self, plan: CaptionPlan) -> None:
        """Take a caption in, as the last lane."""
        super().join(plan)
        self._running.scores[-1] = 0.0

    def _live_rows(self) -> BoolArray:
        live: BoolArray = ~self._running.ended
        return live

    def _extend(self, choices: Choices, probe_logprobs: Float32Array) -> None:
        ranks = self._choose(choices)[:, :, None]
        running = self._running
        moving = ~running.ended[choices.lanes]
        taking, rows = np.nonzero(moving)
        lanes = choices.lanes[taking]
        tokens = np.take_along_axis(choices.tokens, ranks, axis=2)[moving, 0]
        logprobs = np.take_along_axis(choices.logprobs, ranks, axis=2)[moving, 0]
        columns = running.lengths[lanes, rows]
        running.tokens[lanes, rows, columns] = tokens
        running.logprobs[lanes, rows, columns] = logprobs
        running.origins[lanes, rows, columns] = choices.origins[moving]
        running.scores[lanes, rows] += logprobs
        running.lengths[lanes, rows] += 1
        running.ended[lanes, rows] = self._is_end(tokens) | (columns + 1 >= self._limits[lanes])
        self._parents[choices.lanes] = choices.origins


class GreedySearch(RowwiseSearch):
    """The most likely token, each time."""

    def _candidates_per_row(self) -> int:
        return 1

    def _choose(self, choices: Choices) -> Int64Array:
        return np.zeros(choices.origins.shape, np.int64)


class SamplingSearch(RowwiseSearch):
    """Tokens drawn from the model's distribution, warped as transformers warps it.

    A row's draws depend on the seed and the row's number only: one uniform number for each token,
    drawn when the caption joins.
    """

    def __init__(self, vocabulary: Vocabulary, rows: int) -> None:
        """Begin without lanes."""
        super().__init__(vocabulary, rows)
        self._uniforms: list[Float64Array] = []

    def join(self, plan: CaptionPlan) -> None:
        """Take a caption in, with its draws."""
        super().join(plan)
        self._uniforms.append(_uniforms(plan.options))

    def leave(self, staying: BoolArray) -> None:
        """Keep the lanes that stay, [lanes]."""
        super().leave(staying)
        self._uniforms = [
            draws for draws, stays in zip(self._uniforms, staying, strict=True) if stays
        ]

    def _candidates_per_row(self) -> int:
        size = self._vocabulary.size
        return max(candidates_drawn_from(plan.options, size) for plan in self._plans)

    def _choose(self, choices: Choices) -> Int64Array:
        options = [self._plans[lane].options for lane in choices.lanes]
        shares = warped_shares(choices.logprobs.astype(np.float64), options)
        columns = self._seen[choices.lanes] - self._given[choices.lanes]
        draws = np.stack(
            [
                self._uniforms[lane][:, column]
                for lane, column in zip(choices.lanes, columns, strict=True)
            ]
        )
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
