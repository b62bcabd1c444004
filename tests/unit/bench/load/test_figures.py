"""Figures: what counts as latency, which calls are counted, and when a rate is held."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from captionserve_server.bench.load.figures import (
    ANSWERED,
    REFUSED,
    Bounds,
    Call,
    Figures,
    Verdict,
    figures_of,
)
from hypothesis import given
from hypothesis import strategies as st

BOUNDS = Bounds(p99_seconds=1.0)
codes = st.sampled_from([ANSWERED, REFUSED, "DEADLINE_EXCEEDED"])
times = st.floats(0, 20)
calls = st.lists(
    st.builds(
        lambda due, late, took, code: Call(due, due + late, due + late + took, code),
        *(times, times, times, codes),
    )
)


def answered(due: float, latency: float = 0.5, late: float = 0.0) -> Call:
    return Call(due, due + late, due + latency, ANSWERED)


def figures(*counted: Call) -> Figures:
    return figures_of(10.0, counted, begin=0.0, end=10.0)


def test_a_call_that_was_sent_late_took_as_long_as_its_caller_waited() -> None:
    found = figures(Call(due=1.0, sent=3.0, ended=4.0, code=ANSWERED))
    assert found.p50_ms == found.p99_ms == 3000.0
    assert found.late_p99_ms == found.late_most_ms == 2000.0


def test_a_stall_counts_for_all_calls_that_came_meanwhile() -> None:
    # Nothing is answered from second 4 to second 6, and all that waited is then. Callers that wait
    # for their answers, as those of a closed loop do, would see the stall once in ten.
    calls = [
        answered(number / 100, 0.01 + max(0.0, 6.0 - number / 100) * (400 <= number < 600))
        for number in range(1000)
    ]
    found = figures(*calls)
    assert found.p50_ms == pytest.approx(10.0)
    assert found.p95_ms == pytest.approx(1510.0)
    assert found.p99_ms == pytest.approx(1910.0)


@given(calls)
def test_every_call_is_counted_once(made: list[Call]) -> None:
    found = figures_of(3.0, made, begin=5.0, end=15.0)
    counted = [call for call in made if 5 <= call.due < 15]
    assert found.calls == len(counted) == sum(found.codes.values())
    assert found.answered_per_second == found.codes.get(ANSWERED, 0) / 10
    assert found.refused_per_second == found.codes.get(REFUSED, 0) / 10
    assert found.due_per_second == len(counted) / 10


def test_calls_before_and_after_the_time_that_counts_do_not() -> None:
    made = [answered(due) for due in (4.9, 5.0, 14.9, 15.0)]
    assert figures_of(3.0, made, begin=5.0, end=15.0).calls == 2


@given(calls)
def test_percentiles_are_latencies_that_occurred(made: list[Call]) -> None:
    found = figures_of(3.0, made, begin=0.0, end=21.0)
    latencies = sorted(1e3 * (call.ended - call.due) for call in made if call.code == ANSWERED)
    for value, share in ((found.p50_ms, 0.5), (found.p95_ms, 0.95), (found.p99_ms, 0.99)):
        if not latencies:
            assert value is None
            continue
        assert value in latencies
        assert sum(each <= value for each in latencies) >= math.floor(share * len(latencies))
        assert sum(each < value for each in latencies) <= share * len(latencies)


def test_a_rate_is_held_by_its_answers_and_their_latencies() -> None:
    held = [answered(number / 10) for number in range(95)]
    held += [Call(9.5 + number / 10, 0, 0.1, REFUSED) for number in range(5)]
    assert figures(*held).verdict(BOUNDS) is Verdict.HELD
    one_less = [*held[1:], Call(9.9, 9.9, 9.91, REFUSED)]
    assert figures(*one_less).verdict(BOUNDS) is Verdict.MISSED
    slow = [answered(0.0, 1.01), answered(0.05, 1.01), *held[2:]]
    assert figures(*slow).verdict(BOUNDS) is Verdict.MISSED


def test_no_answer_is_no_rate_held() -> None:
    assert figures().verdict(BOUNDS) is Verdict.MISSED
    assert figures(Call(1.0, 1.0, 2.0, "UNAVAILABLE")).verdict(BOUNDS) is Verdict.MISSED


def test_a_late_generator_leaves_it_open_what_the_service_would_have_held() -> None:
    slow = [answered(number / 10, latency=2.0, late=0.11) for number in range(100)]
    assert figures(*slow).verdict(BOUNDS) is Verdict.GENERATOR_LATE
    assert figures(*(replace(each, sent=each.due) for each in slow)).verdict(BOUNDS) is (
        Verdict.MISSED
    )
    # In spite of it.
    fast = [answered(number / 10, latency=0.9, late=0.8) for number in range(100)]
    assert figures(*fast).verdict(BOUNDS) is Verdict.HELD
