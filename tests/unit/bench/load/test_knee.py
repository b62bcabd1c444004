"""The knee, and the sweep that finds it, against services that hold what they are said to hold."""

from __future__ import annotations

import pytest
from captionserve_server.bench.load.figures import Verdict
from captionserve_server.bench.load.knee import CLOSE, Knee, knee_of, sweep
from hypothesis import given
from hypothesis import strategies as st

HELD, MISSED, LATE = Verdict.HELD, Verdict.MISSED, Verdict.GENERATOR_LATE


def swept(first: float, capacity: float) -> list[tuple[float, Verdict]]:
    """A sweep of a service that holds so much, in its order."""
    asked: list[tuple[float, Verdict]] = []

    def holds(rate: float) -> bool:
        asked.append((rate, HELD if rate <= capacity else MISSED))
        return rate <= capacity

    sweep(first, holds)
    return asked


@given(st.floats(0.1, 100), st.floats(0.1, 300))
def test_a_sweep_finds_what_a_service_holds(first: float, times: float) -> None:
    asked = swept(first, first * times)
    knee = knee_of(asked)
    assert knee.rate is not None
    assert knee.missed is not None
    assert knee.certain
    assert knee.rate <= first * times < knee.missed
    # To three digits.
    assert knee.missed <= 1.02 * CLOSE * knee.rate
    assert len(asked) == len(set(asked)) <= 20


def test_a_sweep_doubles_and_then_goes_halfway() -> None:
    rates = [rate for rate, _ in swept(10.0, 45.0)]
    assert rates == [10, 20, 40, 80, 60, 50, 45, 47.5, 46.2]


@pytest.mark.parametrize("capacity", [0.0, 1e9])
def test_a_sweep_of_all_or_nothing_ends(capacity: float) -> None:
    knee = knee_of(swept(10.0, capacity))
    assert (knee.rate is None) == (capacity == 0.0)
    assert (knee.missed is None) == (capacity == 1e9)


@given(st.permutations([(10.0, HELD), (20.0, HELD), (30.0, MISSED), (40.0, HELD), (50.0, LATE)]))
def test_what_is_held_above_a_rate_that_is_not_does_not_count(
    verdicts: list[tuple[float, Verdict]],
) -> None:
    assert knee_of(verdicts) == Knee(20.0, 30.0, certain=True)


def test_a_late_generator_makes_the_knee_uncertain() -> None:
    assert knee_of([(10.0, HELD), (20.0, LATE)]) == Knee(10.0, 20.0, certain=False)
    assert knee_of([(10.0, MISSED)]) == Knee(None, 10.0, certain=True)
    assert knee_of([(10.0, HELD)]).missed is None
