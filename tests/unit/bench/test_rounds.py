"""Rounds: who runs when, and what is made of a run."""

from __future__ import annotations

import os

import pytest
from captionserve_server.bench.rounds import Measurements, Rounds
from captionserve_server.bench.rows import Load, Options, Row, Run, TokenIds


class FakePeer:
    """Captions every image with its number, and notes what it was asked for."""

    def __init__(self, fails_at: int | None = None, says: TokenIds = (7, 0)) -> None:
        self.pid = os.getpid()
        self.versions: dict[str, str] = {}
        self.asked: list[tuple[int, int, Options]] = []
        self._fails_at = fails_at
        self._says = says

    def run(self, images: int, load: Load, options: Options) -> Run:
        if len(self.asked) == self._fails_at:
            raise RuntimeError("out of order")
        self.asked.append((images, load.at_once, options))
        latencies = [0.001 * (image + 1) for image in range(images)]
        return Run(2.0, latencies, [(image, *self._says) for image in range(images)], {"steps": 3})


def row(peer: str, load: int = 1, num_beams: int = 1) -> Row:
    return Row(peer, "fp32", Load(load, "batch"), num_beams)


def measured(
    peers: dict[str, FakePeer], rows: list[Row], rounds: int
) -> tuple[Measurements, list[str]]:
    measurements, told = Measurements(), list[str]()
    lengths = {"min_length": 6, "max_length": 6}
    Rounds(peers, 4, lengths, measurements, told.append).measure(
        rows, rounds, before_round=lambda: told.append("machine")
    )
    return measurements, told


def test_rows_take_turns_after_warming_up_and_each_round_begins_with_another() -> None:
    peers = {"a": FakePeer(), "b": FakePeer()}
    rows = [row("a", 1), row("a", 8), row("b", 2)]
    measurements, told = measured(peers, rows, rounds=4)
    assert told[:6] == [
        "warming up: a, batch 8, greedy",
        "warming up: b, batch 2, greedy",
        "machine",
        "round 1 of 4: a, batch 1, greedy",
        "round 1 of 4: a, batch 8, greedy",
        "round 1 of 4: b, batch 2, greedy",
    ]
    assert told.count("machine") == 4
    small, large, other = (each.label for each in rows)
    orders = [[small, large, other], [large, other, small], [other, small, large]]
    expected = [(label, number) for number in range(4) for label in orders[number % 3]]
    assert [(sample.row, sample.round) for sample in measurements.samples] == expected
    options = {"num_beams": 1, "min_length": 6, "max_length": 6}
    # To warm up, as many as the load; later every load comes round twice or more.
    assert peers["a"].asked[:3] == [(8, 8, options), (4, 1, options), (16, 8, options)]


def test_a_sample_says_what_the_run_gave() -> None:
    measurements, _ = measured({"a": FakePeer()}, [row("a")], rounds=1)
    (sample,) = measurements.samples
    assert sample.images_per_second == 2.0
    assert sample.latency_p50_ms == pytest.approx(2.5)
    assert 3.9 < sample.latency_p99_ms <= 4.0
    assert sample.tokens == 3
    assert sample.stages_ms == {"steps": 3}
    assert sample.memory_mib > 0


def test_captions_are_compared_with_the_first_row_of_as_many_beams() -> None:
    peers = {"a": FakePeer(), "b": FakePeer(says=(8, 0))}
    # The last has more images than the first of as many beams; those that both have count.
    rows = [row("a"), row("b"), row("b", num_beams=4), row("a", num_beams=4), row("a", load=8)]
    measurements, _ = measured(peers, rows, rounds=1)
    assert [sample.same_captions for sample in measurements.samples] == [1, 0, 1, 0, 1]


def test_a_system_that_fails_spoils_no_other() -> None:
    # It warms up and does one round, then fails.
    peers = {"a": FakePeer(fails_at=2), "b": FakePeer()}
    measurements, _ = measured(peers, [row("a"), row("b")], rounds=3)
    assert measurements.failures == {"a": "a, batch 1, greedy: out of order"}
    assert [sample.row[0] for sample in measurements.samples] == ["a", "b", "b", "b"]


def test_a_system_that_cannot_warm_up_is_not_measured() -> None:
    measurements, _ = measured({"a": FakePeer(fails_at=0)}, [row("a")], rounds=2)
    assert measurements == Measurements([], {"a": "a, batch 1, greedy: out of order"})


def test_a_system_that_did_not_start_is_left_out() -> None:
    measurements, _ = measured({"a": FakePeer()}, [row("a"), row("b")], rounds=1)
    assert [sample.row for sample in measurements.samples] == ["a, batch 1, greedy"]
