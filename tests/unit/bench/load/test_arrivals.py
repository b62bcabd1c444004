"""Arrivals: those of a Poisson process, the same for the same seed."""

from __future__ import annotations

import itertools
import math
import statistics

from captionserve_server.bench.load.arrivals import poisson_arrivals
from hypothesis import given, settings
from hypothesis import strategies as st

rates = st.floats(0.1, 1000)
shares = st.floats(0, 1)
seeds = st.integers(0, 2**32)


@given(rates, st.floats(0.1, 5), shares, seeds, st.integers(1, 40))
@settings(deadline=None)
def test_arrivals_are_in_order_and_within_their_time(
    rate: float, seconds: float, cached_share: float, seed: int, images: int
) -> None:
    arrivals = poisson_arrivals(rate, seconds, images=images, cached_share=cached_share, seed=seed)
    due = [each.due for each in arrivals]
    assert due == sorted(due)
    assert all(0 < each < seconds for each in due)
    assert all(0 <= each.image < images for each in arrivals)
    again = poisson_arrivals(rate, seconds, images=images, cached_share=cached_share, seed=seed)
    assert again == arrivals


@given(rates, seeds)
@settings(deadline=None)
def test_at_twice_the_rate_the_same_calls_come_in_half_the_time(rate: float, seed: int) -> None:
    choices = {"images": 16, "cached_share": 0.5, "seed": seed}
    slow = poisson_arrivals(rate, 40 / rate, **choices)  # type: ignore[arg-type]
    fast = poisson_arrivals(2 * rate, 20 / rate, **choices)  # type: ignore[arg-type]
    for one, other in zip(slow, fast, strict=True):
        assert math.isclose(one.due, 2 * other.due)
        assert (one.image, one.repeated) == (other.image, other.repeated)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_gaps_are_exponential_and_counts_are_poisson(seed: int) -> None:
    rate, seconds = 50.0, 200.0
    arrivals = poisson_arrivals(rate, seconds, images=4, cached_share=0.3, seed=seed)
    due = [each.due for each in arrivals]
    gaps = [after - before for before, after in itertools.pairwise(due)]
    # Six standard errors; calls that come evenly, or together, are far outside.
    most = 6 / math.sqrt(rate * seconds)
    assert abs(statistics.fmean(gaps) * rate - 1) < most
    assert abs(statistics.stdev(gaps) * rate - 1) < 2 * most
    counts = [sum(begin <= each < begin + 1 for each in due) for begin in range(int(seconds))]
    assert 0.4 < statistics.variance(counts) / rate < 1.6
    repeated = statistics.fmean(each.repeated for each in arrivals)
    assert abs(repeated - 0.3) < most


def test_a_share_of_none_or_all_is_exact() -> None:
    for share in (0.0, 1.0):
        arrivals = poisson_arrivals(100, 10, images=3, cached_share=share, seed=1)
        assert {each.repeated for each in arrivals} == {bool(share)}
