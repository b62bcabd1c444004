"""Records of lanes: what keeping and joining do to every kind of field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from captionserve_server.core.search.lanes import LaneRecord
from captionserve_server.core.step_model import Int64Array


@dataclass(frozen=True)
class Inner(LaneRecord):
    numbers: Int64Array


@dataclass(frozen=True)
class Record(LaneRecord):
    names: tuple[str, ...]
    tokens: Int64Array
    inner: Inner


def record(name: str, longest: int) -> Record:
    number = ord(name)
    return Record((name,), np.full((1, 2, longest), number), Inner(np.array([number])))


def test_lanes_follow_in_every_field_and_tokens_are_as_long_as_the_longest() -> None:
    first, second = record("a", 2), record("b", 3)
    for both, order in ((first.followed_by(second), "ab"), (second.followed_by(first), "ba")):
        assert both.names == tuple(order)
        assert both.inner.numbers.tolist() == [ord(name) for name in order]
        assert both.tokens.shape == (2, 2, 3)
        at = order.index("a")
        assert both.tokens[at, 0].tolist() == [ord("a"), ord("a"), 0]
        assert both.tokens[1 - at, 0].tolist() == [ord("b")] * 3


def test_only_lanes_that_stay_are_kept_in_arrays_of_their_own() -> None:
    both = record("a", 2).followed_by(record("b", 2))
    kept = both.kept(np.array([False, True]))
    assert kept.names == ("b",)
    assert kept.inner.numbers.tolist() == [ord("b")]
    kept.tokens[:] = 0
    assert both.tokens[1, 0, 0] == ord("b")


def test_new_fields_leave_the_record_as_it_was() -> None:
    before = record("a", 2)
    after = before.with_fields(names=("c",))
    assert before.names == ("a",)
    assert after.names == ("c",)
    assert after.tokens is before.tokens
