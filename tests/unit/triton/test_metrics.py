"""The decoder's metrics: what is shown, when, and that a failing one costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.triton.answered import WAIT_SECONDS, wait_until
from tests.unit.triton.stand_in import Logger, MetricFamily

SLOTS = 8


class Setup:
    """The metrics of a decoder whose figures a test says."""

    def __init__(self) -> None:
        from captionserve_server.triton.metrics import DecoderMetrics

        self.scheduler = SimpleNamespace(running=0, waiting=0)
        graphs = {name: SimpleNamespace(seconds=0.0) for name in ("prefill", "step", "top")}
        self.graphs = SimpleNamespace(**graphs)
        self.step_model = SimpleNamespace(graphs=self.graphs, bytes_used=0)
        self.died: list[BaseException] = []
        self.metrics = DecoderMetrics(
            1, SLOTS, cast(Any, self.scheduler), cast(Any, self.step_model), self.died.append
        )


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    MetricFamily.fails = False
    made.metrics.close()
    assert not made.died


def shown(name: str) -> float:
    return MetricFamily.values[f"captionserve_{name}"]


def test_before_the_first_step_everything_but_the_slots_is_zero(setup: Setup) -> None:
    assert shown("slots") == SLOTS
    others = {name for name, value in MetricFamily.values.items() if value == 0}
    assert others == {
        f"captionserve_{name}"
        for name in (
            "slots_used",
            "waiting_captions",
            "kv_cache_bytes",
            "engine_steps_total",
            "engine_seconds_total",
            "image_seconds_total",
            "prefill_seconds_total",
            "step_seconds_total",
            "top_seconds_total",
        )
    }


def test_each_figure_is_shown_under_its_own_name(setup: Setup) -> None:
    setup.scheduler.running, setup.scheduler.waiting = 3, 5
    setup.step_model.bytes_used = 7
    setup.graphs.prefill.seconds, setup.graphs.step.seconds = 11.0, 13.0
    setup.graphs.top.seconds = 17.0
    setup.metrics.count_step(19.0)
    wait_until(lambda: shown("top_seconds_total") == 17)
    assert MetricFamily.values == {
        "captionserve_slots": SLOTS,
        "captionserve_slots_used": 3,
        "captionserve_waiting_captions": 5,
        "captionserve_kv_cache_bytes": 7,
        "captionserve_engine_steps_total": 1,
        "captionserve_engine_seconds_total": 19,
        "captionserve_image_seconds_total": 0,
        "captionserve_prefill_seconds_total": 11,
        "captionserve_step_seconds_total": 13,
        "captionserve_top_seconds_total": 17,
    }


def test_steps_between_two_showings_are_all_counted(setup: Setup) -> None:
    for _ in range(5):
        setup.metrics.count_step(0.5)
    wait_until(lambda: shown("engine_steps_total") == 5)
    wait_until(lambda: shown("engine_seconds_total") == 2.5)
    setup.metrics.count_step(0.5)
    wait_until(lambda: shown("engine_steps_total") == 6)


def test_what_is_shown_was_so_at_the_end_of_a_step(setup: Setup) -> None:
    setup.scheduler.running = 3
    setup.metrics.count_step(0.0)
    # What the thread would see, if it looked for itself.
    setup.scheduler.running = 1
    wait_until(lambda: shown("engine_steps_total") == 1)
    assert shown("slots_used") == 3


def test_the_time_of_an_image_counts_even_if_it_is_none(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captionserve_server.triton import metrics

    clock = iter([1.0, 2.5, 10.0, 14.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with setup.metrics.image():
        pass
    with pytest.raises(ValueError, match="no image"), setup.metrics.image():
        raise ValueError("no image")
    setup.metrics.count_step(0.0)
    wait_until(lambda: shown("image_seconds_total") == 5.5)


def test_a_metric_that_raises_is_logged_and_shown_when_it_works_again(setup: Setup) -> None:
    MetricFamily.fails = True
    setup.scheduler.running = 3
    setup.metrics.count_step(0.0)
    wait_until(lambda: "RuntimeError: the metric fails" in Logger.lines)
    MetricFamily.fails = False
    setup.metrics.count_step(0.0)
    wait_until(lambda: shown("engine_steps_total") == 2)
    assert shown("slots_used") == 3


def test_the_thread_ends_when_it_is_closed_before_a_step_or_after() -> None:
    for steps in (0, 1):
        setup = Setup()
        for _ in range(steps):
            setup.metrics.count_step(0.0)
        setup.metrics.close()
        assert setup.metrics._worker.join(WAIT_SECONDS)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(
    values=st.lists(st.tuples(st.integers(0, 1000), st.booleans()), min_size=1),
    counts=st.booleans(),
)
def test_after_any_values_and_failures_the_last_is_shown(
    values: list[tuple[int, bool]], counts: bool
) -> None:
    from captionserve_server.triton.metrics import _Shown

    if counts:
        values = sorted(values)
    kind = MetricFamily.COUNTER if counts else MetricFamily.GAUGE
    each = _Shown("value", kind, "A value.", {})
    for value, fails in values:
        MetricFamily.fails = fails
        with suppress(RuntimeError):
            each.show(value)
    MetricFamily.fails = False
    each.show(values[-1][0])
    assert shown("value") == values[-1][0]
