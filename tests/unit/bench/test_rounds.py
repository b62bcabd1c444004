"""Rounds: who runs when, and what is made of a run."""

from __future__ import annotations

import dataclasses
import os
from contextlib import nullcontext

import pytest
from captionserve_server.bench.rounds import Measurements, Rounds, images_of, share_equal, turns
from captionserve_server.bench.rows import Decoding, PeerPlan, Row, Run, TokenIds, rows_of


class FakePeer:
    """Captions every image with its number, and notes what it was asked for."""

    pid = os.getpid()
    versions: dict[str, str]

    def __init__(self, fails_at: int | None = None, says: TokenIds = (7, 0)) -> None:
        self.versions = {}
        self.asked: list[tuple[int, int, Decoding]] = []
        self._fails_at = fails_at
        self._says = says

    def run(self, images: int, load: int, decoding: Decoding) -> Run:
        if len(self.asked) == self._fails_at:
            raise RuntimeError("out of order")
        self.asked.append((images, load, decoding))
        latencies = [0.001 * (image + 1) for image in range(images)]
        return Run(2.0, latencies, [(image, *self._says) for image in range(images)], {"steps": 3})


def row(peer: str, load: int = 1, num_beams: int = 1) -> Row:
    return Row(peer, "fp32", "batch", load, num_beams)


def measured(
    peers: dict[str, FakePeer], rows: list[Row], rounds: int
) -> tuple[Measurements, list[str]]:
    measurements, told = Measurements(), list[str]()
    Rounds(peers, images=4, forced_tokens=5, progress=told.append).measure(
        rows, rounds, measurements, before_round=lambda: told.append("machine")
    )
    return measurements, told


def test_every_round_begins_with_another_row() -> None:
    rows = [row("a"), row("b"), row("c")]
    orders = [[each.peer for each in turns(rows, number)] for number in range(4)]
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_rows_run_once_a_round_after_warming_up() -> None:
    peers = {"a": FakePeer(), "b": FakePeer()}
    rows = [row("a", 1), row("a", 8), row("b", 2)]
    measurements, told = measured(peers, rows, rounds=2)
    assert told == [
        "warming up: a, batch 8, greedy",
        "warming up: b, batch 2, greedy",
        "machine",
        "round 1 of 2: a, batch 1, greedy",
        "round 1 of 2: a, batch 8, greedy",
        "round 1 of 2: b, batch 2, greedy",
        "machine",
        "round 2 of 2: a, batch 8, greedy",
        "round 2 of 2: b, batch 2, greedy",
        "round 2 of 2: a, batch 1, greedy",
    ]
    assert [(sample.row, sample.round) for sample in measurements.samples] == [
        ("a, batch 1, greedy", 0),
        ("a, batch 8, greedy", 0),
        ("b, batch 2, greedy", 0),
        ("a, batch 8, greedy", 1),
        ("b, batch 2, greedy", 1),
        ("a, batch 1, greedy", 1),
    ]
    forced = Decoding(1, 5)
    assert peers["a"].asked == [
        (8, 8, forced),
        (4, 1, forced),
        (16, 8, forced),
        (16, 8, forced),
        (4, 1, forced),
    ]


def test_a_sample_says_what_the_run_gave() -> None:
    measurements, _ = measured({"a": FakePeer()}, [row("a")], rounds=1)
    (sample,) = measurements.samples
    assert sample.images == 4
    assert sample.images_per_second == 2.0
    assert sample.latency_p50_ms == pytest.approx(2.5)
    assert 3.9 < sample.latency_p99_ms <= 4.0
    assert sample.tokens == 3
    assert sample.stages_ms == {"steps": 3}
    assert 0 < sample.memory_mib <= sample.peak_rss_mib
    assert sample.cpu_seconds >= 0
    assert sample.others_cpu_seconds == 0


def test_captions_are_compared_with_the_first_row_of_as_many_beams() -> None:
    peers = {"a": FakePeer(), "b": FakePeer(says=(8, 0))}
    rows = [row("a"), row("b"), row("b", num_beams=4), row("a", num_beams=4)]
    measurements, _ = measured(peers, rows, rounds=1)
    assert [sample.same_captions for sample in measurements.samples] == [1.0, 0.0, 1.0, 0.0]


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


def test_a_large_load_gets_images_enough() -> None:
    assert images_of(row("a", load=1), at_least=16) == 16
    assert images_of(row("a", load=64), at_least=16) == 128


def test_only_images_that_both_have_are_compared() -> None:
    assert share_equal([(1,), (2,)], [(1,), (3,), (4,)]) == 0.5


def test_rows_are_chosen_by_the_beginning_of_their_labels() -> None:
    plans = [
        PeerPlan("transformers", "fp32", "batch", (1, 8), nullcontext),  # type: ignore[arg-type]
        PeerPlan("ours int8", "int8", "in flight", (4,), nullcontext),  # type: ignore[arg-type]
    ]
    assert [each.label for each in rows_of(plans, (1, 4), ["*"])] == [
        "transformers, batch 1, greedy",
        "transformers, batch 8, greedy",
        "ours int8, 4 in flight, greedy",
        "transformers, batch 1, 4 beams",
        "transformers, batch 8, 4 beams",
        "ours int8, 4 in flight, 4 beams",
    ]
    chosen = rows_of(plans, (4,), ["ours", "*, batch 8"])
    assert [each.label for each in chosen] == [
        "transformers, batch 8, 4 beams",
        "ours int8, 4 in flight, 4 beams",
    ]
    assert rows_of(plans, (1,), ["nobody"]) == []
    assert dataclasses.asdict(chosen[1])["precision"] == "int8"


def test_forced_lengths_count_the_start_token() -> None:
    assert Decoding(4).as_options() == {"num_beams": 4}
    forced = {"num_beams": 1, "min_length": 17, "max_length": 17}
    assert Decoding(1, 16).as_options() == forced
