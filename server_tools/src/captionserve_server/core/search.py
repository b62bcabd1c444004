"""The decoding methods: what one caption does with each step's candidates.

A search is a small state machine without I/O. The engine asks for its rows, runs them with
everybody else's, and hands the candidates back:

    search.tokens, search.parents   the rows to run next
    search.advance(...)             what the model said about them
    search.finished                 whether to ask again
    search.captions()               the result, best first

Both methods here give, token for token, what transformers' generate() gives for the same
log-probabilities; its beam search is the reference for every rule and its order below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.step_model import Float32Array, Int64Array

FinishReason = Literal["eos", "length"]

# Marks scores that must never win; the value transformers uses, so that ties fall alike.
_NEVER = np.float32(-1.0e9)


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning to decoding.

    Attributes:
        start: the decoder start token.
        end: tokens that end a caption.
    """

    start: int
    end: tuple[int, ...]


@dataclass(frozen=True)
class DecodedCaption:
    """One finished caption.

    Attributes:
        token_ids: generated tokens, without the start token, with the end token if produced.
        token_logprobs: natural log-probability of each.
        score: sum(token_logprobs) / len(token_ids) ** length_penalty.
        finish_reason: "eos" or "length".
    """

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    score: float
    finish_reason: FinishReason


class Search(Protocol):
    """One caption's decoding state."""

    @property
    def tokens(self) -> Int64Array:
        """[rows], the newest token of each row to run."""

    @property
    def parents(self) -> Int64Array:
        """[rows], the row of the previous step that each continues."""

    @property
    def num_candidates(self) -> int:
        """Candidates wanted per row."""

    @property
    def finished(self) -> bool:
        """Whether no further step is wanted."""

    def advance(self, logprobs: Float32Array, tokens: Int64Array) -> None:
        """Take one step's candidates in; both [rows, num_candidates], descending."""

    def captions(self) -> list[DecodedCaption]:
        """The captions asked for, best first; only when finished."""


def start_search(options: DecodingOptions, special: SpecialTokens) -> Search:
    """The search that the options ask for."""
    if options.num_beams == 1:
        return GreedySearch(options, special)
    return BeamSearch(options, special)


class GreedySearch:
    """The most likely token, each time."""

    num_candidates = 1

    def __init__(self, options: DecodingOptions, special: SpecialTokens) -> None:
        """Begin before the first token."""
        self._options = options
        self._special = special
        self._token_ids: list[int] = []
        self._token_logprobs: list[float] = []

    @property
    def tokens(self) -> Int64Array:
        """[1], the newest token."""
        newest = self._token_ids[-1] if self._token_ids else self._special.start
        return np.array([newest], dtype=np.int64)

    @property
    def parents(self) -> Int64Array:
        """[1], always 0."""
        return np.zeros(1, dtype=np.int64)

    @property
    def finished(self) -> bool:
        """Whether the end token or the length limit was reached."""
        return self._ended or len(self._token_ids) >= self._options.max_length - 1

    @property
    def _ended(self) -> bool:
        return bool(self._token_ids) and self._token_ids[-1] in self._special.end

    def advance(self, logprobs: Float32Array, tokens: Int64Array) -> None:
        """Take the best candidate; both arrays [1, at least 1]."""
        self._token_ids.append(int(tokens[0, 0]))
        self._token_logprobs.append(float(logprobs[0, 0]))

    def captions(self) -> list[DecodedCaption]:
        """The one caption."""
        total, length = sum(self._token_logprobs), len(self._token_ids)
        caption = DecodedCaption(
            token_ids=tuple(self._token_ids),
            token_logprobs=tuple(self._token_logprobs),
            score=total / length**self._options.length_penalty,
            finish_reason="eos" if self._ended else "length",
        )
        return [caption]


@dataclass
class _Hypotheses:
    """Sequences side by side; every array's first dim is the hypothesis.

    Attributes:
        scores: float32 [n]; running ones are sums, completed ones divided by the length penalty.
        token_ids: int64 [n, longest]; only the first `lengths` entries of a row count.
        token_logprobs: float32 [n, longest].
        lengths: int64 [n].
        ended: bool [n], completed rather than a placeholder.
    """

    scores: Float32Array
    token_ids: Int64Array
    token_logprobs: Float32Array
    lengths: Int64Array
    ended: np.ndarray[tuple[int], np.dtype[np.bool_]]

    @classmethod
    def placeholders(cls, count: int, longest: int) -> _Hypotheses:
        """`count` hypotheses that lose against any real one."""
        return cls(
            scores=np.full(count, _NEVER, dtype=np.float32),
            token_ids=np.zeros((count, longest), dtype=np.int64),
            token_logprobs=np.zeros((count, longest), dtype=np.float32),
            lengths=np.zeros(count, dtype=np.int64),
            ended=np.zeros(count, dtype=np.bool_),
        )

    def take(self, index: Int64Array) -> _Hypotheses:
        """The hypotheses at `index`, in that order; a copy."""
        return _Hypotheses(
            self.scores[index],
            self.token_ids[index],
            self.token_logprobs[index],
            self.lengths[index],
            self.ended[index],
        )

    def joined(self, other: _Hypotheses) -> _Hypotheses:
        """These, then the others."""
        return _Hypotheses(
            np.concatenate((self.scores, other.scores)),
            np.concatenate((self.token_ids, other.token_ids)),
            np.concatenate((self.token_logprobs, other.token_logprobs)),
            np.concatenate((self.lengths, other.lengths)),
            np.concatenate((self.ended, other.ended)),
        )


def _best(scores: Float32Array, count: int) -> Int64Array:
    """Indices of the `count` highest scores, descending; the earlier one first among equals."""
    return np.argsort(-scores, kind="stable")[:count]


class BeamSearch:
    """Beam search with transformers' stopping rules."""

    def __init__(self, options: DecodingOptions, special: SpecialTokens) -> None:
        """Begin before the first token, with one row: the beams part at its candidates."""
        self._options = options
        self._special = special
        self._end_ids = np.array(special.end, dtype=np.int64)
        self._longest = options.max_length - 1
        # Enough that num_beams of them go on when every beam's best choice is to end.
        self._kept = max(2, 1 + len(special.end)) * options.num_beams
        self._running = _Hypotheses.placeholders(1, self._longest)
        self._running.scores[0] = 0.0
        self._completed = _Hypotheses.placeholders(options.num_beams, self._longest)
        self._parents = np.zeros(1, dtype=np.int64)
        self._generated = 0
        self._improvable = True
        self._finished = False

    @property
    def tokens(self) -> Int64Array:
        """[beams], the newest token of each; [1] before the first step."""
        if self._generated == 0:
            return np.array([self._special.start], dtype=np.int64)
        return self._running.token_ids[:, self._generated - 1]

    @property
    def parents(self) -> Int64Array:
        """[beams], the beam of the previous step that each continues."""
        return self._parents

    @property
    def num_candidates(self) -> int:
        """Candidates wanted per beam."""
        return self._kept

    @property
    def finished(self) -> bool:
        """Whether better captions are out of reach or out of bounds."""
        return self._finished

    def advance(self, logprobs: Float32Array, tokens: Int64Array) -> None:
        """Extend, complete and prune; both arrays [beams, at least num_candidates]."""
        extended, beams = self._extend(logprobs, tokens)
        self._generated += 1
        self._complete(extended)
        going_on = extended.scores + extended.ended * _NEVER
        kept = _best(going_on, self._options.num_beams)
        self._running = extended.take(kept)
        self._running.scores = going_on[kept]
        self._parents = beams[kept]
        self._finished = self._is_finished(all_ended=bool(extended.ended.all()))

    def captions(self) -> list[DecodedCaption]:
        """The best num_return_sequences captions."""
        return [self._caption(row) for row in range(self._options.num_return_sequences)]

    def _extend(self, logprobs: Float32Array, tokens: Int64Array) -> tuple[_Hypotheses, Int64Array]:
        """The best continuations over all beams, and the beam of each, [kept]."""
        per_row = logprobs.shape[1]
        totals = (logprobs + self._running.scores[:, None]).ravel()
        chosen = _best(totals, self._kept)
        beams = chosen // per_row
        extended = self._running.take(beams)
        extended.scores = totals[chosen]
        extended.token_ids[:, self._generated] = tokens.ravel()[chosen]
        extended.token_logprobs[:, self._generated] = logprobs.ravel()[chosen]
        extended.lengths[:] = self._generated + 1
        at_limit = self._generated + 1 >= self._longest
        extended.ended = np.isin(extended.token_ids[:, self._generated], self._end_ids) | at_limit
        return extended, beams

    def _complete(self, extended: _Hypotheses) -> None:
        """Let continuations that ended compete with the completed captions.

        Only the first num_beams continuations may: the rest are there to keep the search alive.
        """
        options = self._options
        ended = extended.ended & (np.arange(len(extended.scores)) < options.num_beams)
        scores = extended.scores / np.float32(self._generated**options.length_penalty)
        full = options.early_stopping == "true" and bool(self._completed.ended.all())
        if full or not self._improvable:
            scores = scores + _NEVER
        scores = np.where(ended, scores, scores + _NEVER)
        contenders = _Hypotheses(
            scores, extended.token_ids, extended.token_logprobs, extended.lengths, ended
        )
        merged = self._completed.joined(contenders)
        self._completed = merged.take(_best(merged.scores, options.num_beams))

    def _is_finished(self, *, all_ended: bool) -> bool:
        self._improvable = self._improvable and self._may_improve()
        full = bool(self._completed.ended.all())
        return (
            not self._improvable or (full and self._options.early_stopping == "true") or all_ended
        )

    def _may_improve(self) -> bool:
        """Whether the best running beam could still beat the worst completed caption."""
        options = self._options
        length = self._generated
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = self._longest
        attainable = self._running.scores[0] / np.float32(length**options.length_penalty)
        worst = self._completed.scores.min() if self._completed.ended.all() else _NEVER
        return bool(attainable > worst)

    def _caption(self, row: int) -> DecodedCaption:
        length = int(self._completed.lengths[row])
        token_ids = tuple(self._completed.token_ids[row, :length].tolist())
        return DecodedCaption(
            token_ids=token_ids,
            token_logprobs=tuple(self._completed.token_logprobs[row, :length].tolist()),
            score=float(self._completed.scores[row]),
            finish_reason="eos" if token_ids[-1] in self._special.end else "length",
        )
