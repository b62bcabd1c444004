"""From logits to candidates: edits, probes, and the best tokens of each row."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from captionserve_server.core.step_model import (
    BoolArray,
    Edit,
    Float32Array,
    Int64Array,
    RowRequests,
    ScoreEdits,
)

# From this many candidates on, sorting whole rows beats the graph's TopK.
_SORTED_FROM = 1024


class TopTokens(Protocol):
    """Finds the highest logits of each row."""

    def __call__(self, logits: Float32Array, count: int) -> tuple[Float32Array, Int64Array]:
        """[rows, V] to values and tokens [rows, count], descending."""


def top_tokens(logits: Float32Array, count: int) -> tuple[Float32Array, Int64Array]:
    """TopTokens by sorting; the lower token first among equals."""
    tokens = np.argsort(-logits, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(logits, tokens, axis=1), tokens


def select(
    logits: Float32Array, log_normalisers: Float32Array, rows: RowRequests, top: TopTokens
) -> tuple[Float32Array, Int64Array, Float32Array]:
    """Edit the logits in place and choose each row's candidates.

    Args:
        logits: [rows, V]; changed by the edits.
        log_normalisers: [rows], log(sum(exp(logits))).
        rows: what is wanted.
        top: how the best are found.

    Returns:
        candidate log-probabilities and tokens, flat, and probe log-probabilities [probes].
    """
    normalisers = _edit(logits, log_normalisers, rows.edits, rows.normalise_first)
    probes = logits[rows.probe_rows, rows.probe_tokens] - normalisers[rows.probe_rows]
    counts = rows.candidate_counts
    best, tokens = _top_by_count(logits, counts, top)
    return best - np.repeat(normalisers, counts), tokens, probes


def _edit(
    logits: Float32Array,
    log_normalisers: Float32Array,
    edits: ScoreEdits,
    normalise_first: BoolArray,
) -> Float32Array:
    """Edit the logits; each row's log-normaliser for what is in them now, [rows]."""
    if not len(edits.rows):
        return log_normalisers
    offsets = np.where(normalise_first, log_normalisers, np.float32(0))
    ends = np.append(np.flatnonzero(np.diff(edits.kinds)) + 1, len(edits.kinds))
    begin = 0
    for end in ends.tolist():
        run = slice(begin, end)
        rows, tokens, values = edits.rows[run], edits.tokens[run], edits.values[run]
        _edit_run(logits, offsets, Edit(edits.kinds[begin]), (rows, tokens, values))
        begin = end
    asked = ~normalise_first[edits.rows] | (edits.kinds == Edit.RENORMALISE)
    renormalised = np.unique(edits.rows[asked])
    if not len(renormalised):
        return log_normalisers
    normalisers = log_normalisers.copy()
    normalisers[renormalised] = _log_sum_exp(logits[renormalised])
    return normalisers


def _edit_run(
    logits: Float32Array,
    offsets: Float32Array,
    kind: Edit,
    run: tuple[Int64Array, Int64Array, Float32Array],
) -> None:
    """Make edits of one kind, in place.

    Args:
        logits: [rows, V].
        offsets: [rows], what is taken off a row's logits to make them scores.
        kind: of all the edits.
        run: their rows, tokens and values, [edits] each.
    """
    rows, tokens, values = run
    if kind is Edit.RENORMALISE:
        return
    if kind is Edit.FORCE:
        logits[rows] = -np.inf
        logits[rows, tokens] = offsets[rows]
        return
    scores = logits[rows, tokens] - offsets[rows]
    if kind is Edit.ADD:
        scores += values
    elif kind is Edit.GROW:
        # What is forbidden stays so: -inf has no magnitude.
        scores += np.where(np.isfinite(scores), np.abs(scores), np.float32(0)) * values
    else:
        forbidden = np.isinf(values)
        finite = np.where(forbidden, np.float32(1), values)
        penalised = np.where(scores < 0, scores * finite, scores / finite)
        scores = np.where(forbidden, -np.inf, penalised)
    logits[rows, tokens] = scores + offsets[rows]


def _log_sum_exp(logits: Float32Array) -> Float32Array:
    """[rows, V] to [rows]."""
    highest = logits.max(axis=1, keepdims=True)
    sums: Float32Array = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0]
    return sums


def _top_by_count(
    logits: Float32Array, counts: Int64Array, top: TopTokens
) -> tuple[Float32Array, Int64Array]:
    """Each row's best, flat; rows that want a few and rows that want most are handled apart."""
    few = np.where(counts < _SORTED_FROM, counts, 0)
    flat = (np.empty(int(counts.sum()), np.float32), np.empty(int(counts.sum()), np.int64))
    if len(few) and few.any():
        _put(flat, counts, np.flatnonzero(few), top(logits, int(few.max())))
    for row in np.flatnonzero(counts >= _SORTED_FROM):
        _put(flat, counts, row[None], top_tokens(logits[row][None], int(counts[row])))
    return flat


def _put(
    flat: tuple[Float32Array, Int64Array],
    counts: Int64Array,
    rows: Int64Array,
    best: tuple[Float32Array, Int64Array],
) -> None:
    """Write the best of `rows` to their places; `best` has all rows, or just the one in `rows`."""
    ranks = np.arange(best[0].shape[1])
    wanted = ranks < counts[rows][:, None]
    begins = np.cumsum(counts) - counts
    cells = (begins[rows][:, None] + ranks)[wanted]
    if len(best[0]) > 1:
        best = best[0][rows], best[1][rows]
    flat[0][cells] = best[0][wanted]
    flat[1][cells] = best[1][wanted]
