"""Edits, probes and candidates against the plain way: whole rows of log-probabilities."""

from __future__ import annotations

import numpy as np
import pytest
from captionserve_server.core.search import selection
from captionserve_server.core.search.selection import select, top_tokens
from captionserve_server.core.step_model import (
    FORBIDDEN,
    Float32Array,
    RowRequests,
    ScoreEdits,
)
from hypothesis import given, settings
from hypothesis import strategies as st

VOCABULARY_SIZE = 12

edit = st.tuples(
    st.integers(0, VOCABULARY_SIZE - 1), st.sampled_from([0.5, 1.3, 2.0, float(FORBIDDEN)])
)
row = st.fixed_dictionaries(
    {
        "count": st.integers(0, VOCABULARY_SIZE),
        "first": st.booleans(),
        "edits": st.lists(edit, max_size=4),
        "probes": st.lists(st.integers(0, VOCABULARY_SIZE - 1), max_size=2),
    }
)
Row = dict[str, object]


def plain_logprobs(logits: Float32Array, wanted: Row) -> Float32Array:
    """One row's processed log-probabilities, as transformers computes them."""
    normaliser = np.log(np.exp(logits).sum())
    scores = logits - normaliser if wanted["first"] else logits.copy()
    before = scores.copy()
    for token, factor in wanted["edits"]:  # type: ignore[attr-defined]
        value = before[token]
        if factor == FORBIDDEN:
            scores[token] = -np.inf
        else:
            scores[token] = value * factor if value < 0 else value / factor
    if wanted["first"]:
        return scores
    if wanted["edits"]:
        normaliser = np.log(np.exp(scores).sum())
    normalised: Float32Array = scores - normaliser
    return normalised


def requests_of(rows: list[Row]) -> RowRequests:
    pairs = [(r, *one) for r, wanted in enumerate(rows) for one in wanted["edits"]]  # type: ignore[attr-defined]
    probes = [(r, token) for r, wanted in enumerate(rows) for token in wanted["probes"]]  # type: ignore[attr-defined]
    return RowRequests(
        tokens=np.zeros(len(rows), np.int64),
        parents=np.zeros(len(rows), np.int64),
        candidate_counts=np.array([wanted["count"] for wanted in rows], np.int64),
        normalise_first=np.array([wanted["first"] for wanted in rows], np.bool_),
        edits=ScoreEdits(
            np.array([pair[0] for pair in pairs], np.int64),
            np.array([pair[1] for pair in pairs], np.int64),
            np.array([pair[2] for pair in pairs], np.float32),
            np.zeros(len(pairs), np.int64),
        ),
        probe_rows=np.array([probe[0] for probe in probes], np.int64),
        probe_tokens=np.array([probe[1] for probe in probes], np.int64),
    )


@pytest.mark.parametrize("sorted_from", [1024, 5])
@settings(max_examples=150, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=5), seed=st.integers(0, 10_000))
def test_candidates_and_probes_are_those_of_whole_rows(
    sorted_from: int, rows: list[Row], seed: int
) -> None:
    shape = (len(rows), VOCABULARY_SIZE)
    logits: Float32Array = np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)
    normalisers: Float32Array = np.log(np.exp(logits).sum(axis=1)).astype(np.float32)
    expected = [plain_logprobs(values, wanted) for values, wanted in zip(logits, rows, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SORTED_FROM", sorted_from)
        found, tokens, probes = select(logits.copy(), normalisers, requests_of(rows), top_tokens)

    begin = 0
    for wanted, scores in zip(rows, expected, strict=True):
        part = slice(begin, begin + int(wanted["count"]))  # type: ignore[call-overload]
        begin = part.stop
        np.testing.assert_allclose(found[part], scores[tokens[part]], rtol=1e-4, atol=1e-4)
        assert len(set(tokens[part].tolist())) == wanted["count"]
        best = np.sort(scores)[::-1][: part.stop - part.start]
        np.testing.assert_allclose(found[part], best, rtol=1e-4, atol=1e-4)
    assert begin == len(found) == len(tokens)
    of_probes = [
        scores[token]
        for wanted, scores in zip(rows, expected, strict=True)
        for token in wanted["probes"]  # type: ignore[attr-defined]
    ]
    np.testing.assert_allclose(probes, of_probes, rtol=1e-4, atol=1e-4)


def test_without_rows_that_want_candidates_nothing_is_searched() -> None:
    def never(
        logits: Float32Array, count: int
    ) -> tuple[Float32Array, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
        raise AssertionError("nobody asked")

    wanted: list[Row] = [{"count": 0, "first": True, "edits": [], "probes": []}] * 2
    logits = np.zeros((2, VOCABULARY_SIZE), np.float32)
    found, tokens, probes = select(logits, np.zeros(2, np.float32), requests_of(wanted), never)
    assert len(found) == len(tokens) == len(probes) == 0
