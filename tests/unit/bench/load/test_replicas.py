"""Replicas are held to cores of their own, and are one target."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from captionserve_server.bench.load import replicas
from captionserve_server.bench.load.replicas import TooFewCoresError, launched_replicas, target_of
from captionserve_server.serving.ready import ReadyReport


@pytest.fixture
def launched_on(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The cores that each service was started on; none is started."""
    cores: list[set[int]] = []

    @contextmanager
    def launch(repository: Path) -> Iterator[ReadyReport]:
        cores.append(os.sched_getaffinity(0))
        yield ReadyReport(f"127.0.0.1:{len(cores)}", "", "", "", "")

    monkeypatch.setattr(replicas, "launched_service", launch)
    return cores


def test_each_has_its_cores_and_we_keep_ours(launched_on: list[set[int]]) -> None:
    ours = os.sched_getaffinity(0)
    count = len(ours)
    with launched_replicas(Path(), count, 1) as services:
        assert target_of(services).count(",") == count - 1
        assert target_of(services).startswith("ipv4:127.0.0.1:1")
        assert os.sched_getaffinity(0) == ours
    assert all(len(cores) == 1 for cores in launched_on)
    assert set.union(*launched_on) == ours


def test_without_a_number_all_have_all(launched_on: list[set[int]]) -> None:
    with launched_replicas(Path(), 2, None):
        assert launched_on == [os.sched_getaffinity(0)] * 2


def test_more_cores_than_there_are_cannot_be_given(launched_on: list[set[int]]) -> None:
    count = len(os.sched_getaffinity(0))
    with pytest.raises(TooFewCoresError), launched_replicas(Path(), 1, count + 1):
        pass
    assert launched_on == []
