"""Rounds: who runs when, and what is made of a run."""

from __future__ import annotations

import os

import pytest
from captionserve_server.bench.cost_model import MachineRates
from captionserve_server.bench.peers.system import Load, Options, Peer, Run, TokenIds
from captionserve_server.bench.report import Comparison, Report
from captionserve_server.bench.rounds import Rounds
from captionserve_server.bench.rows import Row
from captionserve_server.export.precision import Precision

PICTURES = [b"0", b"1", b"2"]


class FakeSystem:
    """Captions every image with its number, and notes what it was asked for."""

    def __init__(self, fails_at: int | None = None, says: TokenIds = (7, 0)) -> None:
        self.asked: list[tuple[list[bytes], int, Options]] = []
        self._fails_at = fails_at
        self._says = says

    def run(self, files: list[bytes], load: Load, options: Options) -> Run:
        if len(self.asked) == self._fails_at:
            raise RuntimeError("out of order")
        self.asked.append((files, load.at_once, options))
        latencies = [0.001 * (place + 1) for place in range(len(files))]
        return Run(2.0, latencies, [(int(file), *self._says) for file in files], {"steps": 3})


def row(peer: str, load: int = 1, num_beams: int = 1) -> Row:
    return Row(peer, Precision.FP32, Load(load, "batch"), num_beams)


def measured(
    systems: dict[str, FakeSystem], rows: list[Row], rounds: int
) -> tuple[Report, list[str]]:
    comparison = Comparison(
        command="captionserve bench",
        checkpoint="tiny",
        repositories={},
        patterns=(),
        references=(),
        num_beams=(1,),
        rounds=rounds,
        images=4,
        forced_tokens=5,
    )
    report, told = Report(comparison, machine={}, config=None), list[str]()

    def machine() -> MachineRates:
        told.append("machine")
        return MachineRates(1.0, 1.0, 1.0)

    peers = {name: Peer(os.getpid(), system.run) for name, system in systems.items()}
    Rounds(peers, PICTURES, report, told.append).measure(rows, machine)
    return report, told


def test_rows_take_turns_after_warming_up_and_each_round_begins_with_another() -> None:
    systems = {"a": FakeSystem(), "b": FakeSystem()}
    rows = [row("a", 1), row("a", 8), row("b", 2)]
    report, told = measured(systems, rows, rounds=4)
    labels = [each.label for each in rows]
    small, large, other = labels
    orders = [[small, large, other], [large, other, small], [other, small, large]]
    expected = [f"warming up: {large}", f"warming up: {other}"]
    for number in range(4):
        expected.append("machine")
        expected += [f"round {number + 1} of 4: {label}" for label in orders[number % 3]]
    assert told == expected
    assert [len(report.rounds[each]) for each in rows] == [4, 4, 4]
    assert len(report.rates) == 4
    options = {"num_beams": 1, "min_length": 6, "max_length": 6}
    # To warm up, as many as the load; later every load comes round twice or more.
    asked = [(len(files), load, options) for files, load, options in systems["a"].asked]
    assert asked[:3] == [(8, 8, options), (4, 1, options), (16, 8, options)]
    assert systems["a"].asked[1][0] == [b"0", b"1", b"2", b"0"]


def test_figures_say_what_the_run_gave() -> None:
    report, _ = measured({"a": FakeSystem()}, [row("a")], rounds=1)
    (figures,) = report.rounds[row("a")]
    assert figures.images_per_second == 2.0
    assert figures.latency_p50_ms == pytest.approx(2.5)
    assert 3.9 < figures.latency_p99_ms <= 4.0
    assert figures.tokens == 3
    assert figures.stages_ms == {"steps": 3}
    assert figures.memory_mib > 0


def test_captions_are_compared_with_the_first_row_of_as_many_beams() -> None:
    peers = {"a": FakeSystem(), "b": FakeSystem(says=(8, 0))}
    # The last has more images than the first of as many beams; those that both have count.
    rows = [row("a"), row("b"), row("b", num_beams=4), row("a", num_beams=4), row("a", load=8)]
    report, _ = measured(peers, rows, rounds=1)
    assert [report.rounds[each][0].same_captions for each in rows] == [1, 0, 1, 0, 1]


def test_a_system_that_fails_spoils_no_other() -> None:
    # It warms up and does one round, then fails.
    peers = {"a": FakeSystem(fails_at=2), "b": FakeSystem()}
    report, _ = measured(peers, [row("a"), row("b")], rounds=3)
    assert report.failures == {"a": "a, batch 1, greedy: out of order"}
    assert {each.peer: len(rounds) for each, rounds in report.rounds.items()} == {"a": 1, "b": 3}


def test_a_system_that_cannot_warm_up_or_did_not_start_is_not_measured() -> None:
    report, _ = measured({"a": FakeSystem(fails_at=0)}, [row("a"), row("b")], rounds=2)
    assert report.failures == {"a": "a, batch 1, greedy: out of order"}
    assert report.rounds == {}
