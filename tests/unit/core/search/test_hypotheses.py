"""Rows that are picked, extended and put in each other's place."""

from __future__ import annotations

import numpy as np
import pytest
from captionserve_server.core.search.hypotheses import (
    Hypotheses,
    best,
    columns,
    is_one_of,
    length_penalised,
    shared_beginning,
)


def numbered(lanes: int, rows: int) -> Hypotheses:
    """Rows of one token, each of a number of its own, with room for three."""
    hypotheses = Hypotheses.none(lanes, rows, 3)
    hypotheses.tokens[:, :, 0] = np.arange(lanes * rows).reshape(lanes, rows)
    hypotheses.scores[:] = -hypotheses.tokens[:, :, 0]
    hypotheses.lengths[:] = 1
    return hypotheses


def test_an_empty_place_is_not_alive_and_loses_to_any_hypothesis() -> None:
    both = Hypotheses.none(1, 2, 3).beside(numbered(1, 2))
    assert both.alive.tolist() == [[False, False, True, True]]
    assert best(both.scores, 4).tolist() == [[2, 3, 0, 1]]


def test_extended_rows_continue_others_and_leave_them_as_they_were() -> None:
    before = numbered(3, 2)
    lanes, rows = np.array([2, 0]), np.array([[1, 1], [0, 1]])
    longer = before.extended(
        lanes,
        rows,
        scores=np.zeros((2, 2), np.float32),
        tokens=np.array([[10, 11], [12, 13]]),
        logprobs=np.full((2, 2), -1, np.float32),
        origins=rows,
    )
    assert longer.tokens[:, :, :2].tolist() == [[[5, 10], [5, 11]], [[0, 12], [1, 13]]]
    assert longer.lengths.tolist() == [[2, 2], [2, 2]]
    assert longer.origins[:, :, 1].tolist() == rows.tolist()
    assert not before.tokens[:, :, 1:].any()
    assert (before.lengths == 1).all()


def test_replaced_rows_are_those_of_the_lanes_and_no_others() -> None:
    before = numbered(3, 4)
    others = Hypotheses.none(2, 2, 3)
    after = before.replaced(np.array([0, 2]), slice(2, 4), others)
    assert np.isneginf(after.scores).tolist() == [
        [False, False, True, True],
        [False, False, False, False],
        [False, False, True, True],
    ]
    assert before.alive.all()


def test_the_best_come_first_and_the_earlier_among_equals() -> None:
    scores = np.array([[1, 3, 3, 2], [-np.inf, 0, -np.inf, -np.inf]], np.float32)
    assert best(scores, 3).tolist() == [[1, 2, 3], [1, 0, 2]]
    assert columns(scores, best(scores, 1)).tolist() == [[3], [0]]


@pytest.mark.parametrize(
    ("rows", "lengths", "shared"),
    [
        ([[1, 2, 3], [1, 2, 4]], [3, 3], (1, 2)),
        ([[1, 2, 3], [1, 2, 3]], [3, 2], (1, 2)),
        ([[1, 2, 3]], [3], (1, 2, 3)),
        ([[1, 0, 0], [2, 0, 0]], [1, 1], ()),
        ([[1, 0, 0], [2, 0, 0]], [0, 1], ()),
    ],
)
def test_what_rows_share_ends_where_the_shortest_or_the_likeness_does(
    rows: list[list[int]], lengths: list[int], shared: tuple[int, ...]
) -> None:
    assert shared_beginning(np.array(rows), np.array(lengths)) == shared


def test_no_rows_share_nothing() -> None:
    assert shared_beginning(np.zeros((0, 3), np.int64), np.zeros(0, np.int64)) == ()


def test_scores_are_divided_by_a_power_of_the_length() -> None:
    scores, lengths = np.array([-6, -6, -6], np.float32), np.array([2, 3, 1])
    found = length_penalised(scores, lengths, np.array([1.0, 0.0, 2.0]))
    assert found.tolist() == [-3, -6, -6]


def test_tokens_are_looked_for_among_few() -> None:
    assert is_one_of(np.array([[1, 2], [3, 1]]), np.array([3, 2])).tolist() == [
        [False, True],
        [True, False],
    ]
