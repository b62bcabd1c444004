"""Rates that others disturb are measured again."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from captionserve_server.bench.load import run
from captionserve_server.bench.load.report import Row
from captionserve_server.bench.load.run import _undisturbed

from tests.unit.bench.load.test_report import PLAN
from tests.unit.bench.load.test_report import row as row_of

CAREFUL = replace(PLAN, most_other_cores=0.5)


@pytest.fixture
def others_took(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What others take in each second from now on; the last of it for ever."""
    now, taken, each_second = 0.0, 0.0, [0.0]

    def sleep(seconds: float) -> None:
        nonlocal now, taken
        now += seconds
        taken += seconds * each_second[0]
        if len(each_second) > 1:
            each_second.pop(0)

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(run, "machine_cpu_seconds", lambda: taken)
    return each_second


def measured(rows: list[Row], others: list[float]) -> Row:
    rows.append(replace(row_of(10), other_cores=others.pop(0)))
    return rows[-1]


@pytest.mark.parametrize(
    ("others", "attempts"),
    [([0.5, 0.0], 1), ([0.6, 2.0, 0.1, 0.0], 3), ([1.0] * 9, 4)],
)
def test_a_disturbed_rate_is_measured_again_a_few_times(
    others_took: list[float], others: list[float], attempts: int
) -> None:
    rows: list[Row] = []
    last = _undisturbed(CAREFUL, [], lambda: measured(rows, others))
    assert last is rows[-1]
    assert len(rows) == attempts


def test_it_waits_for_quiet_and_not_for_ever(others_took: list[float]) -> None:
    rows: list[Row] = []
    others_took[:] = [2.0, 1.0, 0.6, 0.5, 2.0]
    _undisturbed(CAREFUL, [], lambda: measured(rows, [0.0]))
    assert others_took == [2.0]
    _undisturbed(CAREFUL, [], lambda: measured(rows, [0.0]))
    assert len(rows) == 2


def test_who_does_not_ask_for_quiet_does_not_wait(others_took: list[float]) -> None:
    others_took[:] = [2.0, 1.0]
    rows: list[Row] = []
    _undisturbed(PLAN, [], lambda: measured(rows, [2.0]))
    assert len(rows) == 1
    assert others_took == [2.0, 1.0]
