"""The logits processors: which tokens' scores are changed before a step's candidates are chosen.

Each is what transformers' processor of the same purpose does, as a list of single changed
scores (core/step_model.py, ScoreEdits), because the scores themselves stay with the model. Their
order is that of transformers' `_get_logits_processor`. Tokens
that occurred are all of a row's: start token and prefix included, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from captionserve_server.core.captions import CaptionPlan, SpecialTokens
from captionserve_server.core.search.hypotheses import is_one_of
from captionserve_server.core.step_model import (
    FORBIDDEN,
    BoolArray,
    Edit,
    Float32Array,
    Float64Array,
    Int64Array,
    ScoreEdits,
)
from captionserve_server.core.words import TokenRuns

_MOST_GROWTH = 69.0
"""Largest natural logarithm of what ExponentialDecay multiplies by."""


@dataclass(frozen=True)
class RowHistories:
    """The rows about to be asked for candidates.

    Attributes:
        plans: the captions' plans.
        caption: [rows], which of the plans each row belongs to.
        tokens: [rows, longest], all tokens of each row so far.
        lengths: [rows], how many of them count.
        special: the checkpoint's special tokens.
    """

    plans: Sequence[CaptionPlan]
    caption: Int64Array
    tokens: Int64Array
    lengths: Int64Array
    special: SpecialTokens

    def option(self, name: str) -> Float64Array:
        """An option's value for each row, float64 [rows]."""
        values = np.array([getattr(plan.options, name) for plan in self.plans], np.float64)
        chosen: Float64Array = values[self.caption]
        return chosen

    def rows_of(self, caption: int) -> Int64Array:
        """The rows of one caption."""
        return np.flatnonzero(self.caption == caption)


class LogitsProcessor(Protocol):
    """One reason to change scores."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether the plan asks for it at all."""

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """What it changes."""


class SequenceBias:
    """Adds to the score of a run's last token where the row ends with the others."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether the checkpoint has biases."""
        return bool(plan.rules.sequence_bias)

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each row and token that any run changes."""
        biases: dict[tuple[int, int], float] = {}
        for caption, plan in enumerate(rows.plans):
            runs, own = plan.rules.bias_runs, rows.rows_of(caption)
            for row, run in np.argwhere(_completing(runs, rows, own)).tolist():
                cell = int(own[row]), int(runs.last[run])
                biases[cell] = biases.get(cell, 0.0) + plan.rules.sequence_bias[run][1]
        cells = np.array(list(biases), np.int64).reshape(-1, 2)
        return _edits(Edit.ADD, cells[:, 0], cells[:, 1], list(biases.values()))


class RepetitionPenalty:
    """Makes tokens that have occurred likelier or unlikelier."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether there is a penalty."""
        return plan.options.repetition_penalty != 1.0

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each token that a row has."""
        penalties = rows.option("repetition_penalty").astype(np.float32)
        present = np.arange(rows.tokens.shape[1]) < rows.lengths[:, None]
        changed, columns = np.nonzero(present & (penalties != 1.0)[:, None])
        return _edits(Edit.PENALISE, changed, rows.tokens[changed, columns], penalties[changed])


class NoRepeatNgram:
    """Forbids what would complete an n-gram that the row has already."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether n-grams are watched."""
        return plan.options.no_repeat_ngram_size > 0

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each earlier occurrence of a row's last n - 1 tokens."""
        sizes = rows.option("no_repeat_ngram_size")
        found = [
            _completions(rows, np.flatnonzero(sizes == size), int(size))
            for size in np.unique(sizes[sizes > 0])
        ]
        return forbid(
            np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])
        )


def _completions(
    rows: RowHistories, chosen: Int64Array, size: int
) -> tuple[Int64Array, Int64Array]:
    """Rows among `chosen`, and tokens, that would repeat an n-gram of `size` tokens."""
    tokens, lengths = rows.tokens[chosen], rows.lengths[chosen]
    if tokens.shape[1] < size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size, axis=1)
    # Where a row is shorter than size - 1 no window fits and the columns do not matter.
    columns = np.maximum(lengths[:, None] - (size - 1) + np.arange(size - 1), 0)
    newest = np.take_along_axis(tokens, columns, axis=1)
    fits = np.arange(windows.shape[1]) + size <= lengths[:, None]
    repeated = fits & (windows[:, :, :-1] == newest[:, None]).all(axis=2)
    found, begins = np.nonzero(repeated)
    return chosen[found], tokens[found, begins + size - 1]


class BadWords:
    """Forbids the last token of a run of tokens where the row ends with the others."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether words are banned."""
        return bool(plan.words.bad)

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each run that a row is about to complete."""
        parts: list[ScoreEdits] = []
        for caption, plan in enumerate(rows.plans):
            if not plan.words.bad:
                continue
            runs, own = plan.words.bad_runs, rows.rows_of(caption)
            # As in transformers, the end of a caption is not a word.
            words = (runs.lengths > 0) | ~is_one_of(runs.last, np.array(rows.special.end, np.int64))
            row, run = np.nonzero(_completing(runs, rows, own) & words)
            parts.append(forbid(own[row], runs.last[run]))
        return joined(parts)


def _completing(runs: TokenRuns, rows: RowHistories, chosen: Int64Array) -> BoolArray:
    """Whether each chosen row ends with all of each run but its last token, [chosen, runs]."""
    longest = runs.before.shape[1]
    completing = np.tile(runs.lengths == 0, (len(chosen), 1))
    if not longest:
        return completing
    columns = rows.lengths[chosen, None] - longest + np.arange(longest)
    tails = rows.tokens[chosen[:, None], np.maximum(columns, 0)].astype(np.int32)
    # No run has this where a row has no token.
    tails[columns < 0] = -2
    # Nearly all differ in the token that comes first to hand.
    row, run = np.nonzero(tails[:, -1:] == runs.before[:, -1])
    equal = np.count_nonzero(tails[row] == runs.before[run], axis=1)
    completing[row, run] = equal == runs.lengths[run]
    return completing


class MinLength:
    """Forbids the end before a caption has min_length tokens."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether there is a minimum."""
        return plan.options.min_length > 0

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each end token of each row that is too short."""
        short = np.flatnonzero(rows.lengths < rows.option("min_length"))
        return forbid_all(short, rows.special.end)


class ForcedStart:
    """Leaves one token to follow the start token."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether the checkpoint forces one; a prefix comes before it."""
        return plan.rules.forced_bos_token_id is not None and plan.given_tokens == 1

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each row that has only its start token."""
        tokens = {
            caption: (plan.rules.forced_bos_token_id,)
            for caption, plan in enumerate(rows.plans)
            if plan.rules.forced_bos_token_id is not None and plan.given_tokens == 1
        }
        return _forced(rows, tokens, rows.lengths == 1)


class ForcedEnd:
    """Leaves only given tokens for the last place."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether the checkpoint forces any."""
        return bool(plan.rules.forced_eos_token_id)

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each token of each row that has one place left."""
        tokens = {
            caption: plan.rules.forced_eos_token_id for caption, plan in enumerate(rows.plans)
        }
        return _forced(rows, tokens, rows.lengths == rows.option("max_length") - 1)


def _forced(
    rows: RowHistories, tokens: Mapping[int, tuple[int, ...]], chosen: BoolArray
) -> ScoreEdits:
    """Edits that leave a caption's tokens only, in its chosen rows; chosen [rows]."""
    parts = [
        _each(Edit.FORCE, own[chosen[own]], own_tokens, 0.0)
        for caption, own_tokens in tokens.items()
        for own in [rows.rows_of(caption)]
    ]
    return joined(parts)


class ExponentialDecay:
    """Makes the end likelier with every token after a number of them."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether the checkpoint asks for it."""
        return plan.rules.exponential_decay_length_penalty is not None

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each end token of each row that is long enough."""
        parts: list[ScoreEdits] = []
        for caption, plan in enumerate(rows.plans):
            if plan.rules.exponential_decay_length_penalty is None:
                continue
            start, factor = plan.rules.exponential_decay_length_penalty
            for row in rows.rows_of(caption):
                beyond = int(rows.lengths[row]) - plan.given_tokens - start
                if beyond > 0:
                    # Beyond this the end is certain, and the sums of a search stay finite.
                    growth = math.expm1(min(beyond * math.log(factor), _MOST_GROWTH))
                    parts.append(_each(Edit.GROW, row[None], rows.special.end, growth))
        return joined(parts)


class SuppressTokens:
    """Forbids given tokens."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether tokens are suppressed."""
        return bool(plan.options.suppress_tokens)

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each row and token."""
        return joined(
            [
                forbid_all(rows.rows_of(caption), plan.options.suppress_tokens)
                for caption, plan in enumerate(rows.plans)
            ]
        )


class BeginSuppressTokens:
    """Forbids given tokens as the first that is generated, or after the one that is forced."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether the checkpoint suppresses any."""
        return bool(plan.rules.begin_suppress_tokens)

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each token of each row that begins."""
        parts: list[ScoreEdits] = []
        for caption, plan in enumerate(rows.plans):
            own = rows.rows_of(caption)
            after_forced = plan.given_tokens == 1 and plan.rules.forced_bos_token_id is not None
            begins = rows.lengths[own] == plan.given_tokens + after_forced
            parts.append(forbid_all(own[begins], plan.rules.begin_suppress_tokens))
        return joined(parts)


class Renormalise:
    """Lets the probabilities sum to 1 again."""

    def applies(self, plan: CaptionPlan) -> bool:
        """Whether the checkpoint asks for it."""
        return plan.rules.renormalize_logits

    def edits(self, rows: RowHistories) -> ScoreEdits:
        """One edit for each row."""
        asking = np.array([plan.rules.renormalize_logits for plan in rows.plans], np.bool_)
        return _each(Edit.RENORMALISE, np.flatnonzero(asking[rows.caption]), (0,), 0.0)


# A penalty must not come after what forbids: of two edits in one run the later one holds.
LOGITS_PROCESSORS: tuple[LogitsProcessor, ...] = (
    SequenceBias(),
    RepetitionPenalty(),
    NoRepeatNgram(),
    BadWords(),
    MinLength(),
    ForcedStart(),
    ForcedEnd(),
    ExponentialDecay(),
    SuppressTokens(),
    BeginSuppressTokens(),
    Renormalise(),
)


def _edits(
    kind: Edit, rows: Int64Array, tokens: Int64Array, values: Sequence[float] | Float32Array
) -> ScoreEdits:
    """Edits of one kind; [edits] all."""
    kinds = np.full(len(rows), kind, np.int64)
    return ScoreEdits(rows, tokens, np.asarray(values, np.float32), kinds)


def _each(kind: Edit, rows: Int64Array, tokens: Sequence[int], value: float) -> ScoreEdits:
    """The same edit of every one of the tokens in every one of the rows."""
    repeated = np.repeat(rows, len(tokens))
    tiled = np.tile(np.array(tokens, np.int64), len(rows))
    return _edits(kind, repeated, tiled, np.full(len(tiled), value, np.float32))


def forbid(rows: Int64Array, tokens: Int64Array) -> ScoreEdits:
    """Edits that forbid tokens; [edits] both."""
    return _edits(Edit.PENALISE, rows, tokens, np.full(len(rows), FORBIDDEN, np.float32))


def forbid_all(rows: Int64Array, tokens: Sequence[int]) -> ScoreEdits:
    """Edits that forbid every one of the tokens in every one of the rows."""
    return _each(Edit.PENALISE, rows, tokens, float(FORBIDDEN))


def joined(parts: Sequence[ScoreEdits]) -> ScoreEdits:
    """All edits, in their order."""
    if not parts:
        return ScoreEdits()
    if len(parts) == 1:
        return parts[0]
    return ScoreEdits(
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.kinds for part in parts]),
    )
