"""Batches and calls in flight: how many at once, which are streamed, and what is told of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
from captionserve_server.bench.peers.system import IN_BULK, Load, Options, System, TokenIds
from captionserve_server.bulk.captioners import Captioner

from tests.unit.bulk.fake_captioner import FakeCaptioner

FILES = [b"0", b"1", b"2", b"3", b"4", b"5"]
GREEDY = {"num_beams": 1}


class Fake(System):
    """Says a file's number, whether it was streamed, and how many beams it took."""

    def __init__(
        self,
        stages: Iterator[dict[str, float]] | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self.batches: list[list[bytes]] = []
        self.threads: set[int] = set()
        self._stages = stages
        self._before = before

    def caption(self, files: list[bytes], options: Options, streamed: bool) -> list[TokenIds]:
        self.batches.append(files)
        self.threads.add(threading.get_ident())
        self._before()
        return [(int(file), int(streamed), options["num_beams"]) for file in files]

    def stage_seconds(self) -> dict[str, float]:
        return super().stage_seconds() if self._stages is None else next(self._stages)


def test_batches_follow_each_other_and_the_last_has_what_is_left() -> None:
    system = Fake()
    run = system.run(FILES[:5], Load(2, "batch"), {"num_beams": 3})
    assert system.batches == [[b"0", b"1"], [b"2", b"3"], [b"4"]]
    assert system.threads == {threading.get_ident()}
    assert run.token_ids == [(number, 0, 3) for number in range(5)]
    assert run.latencies[0] == run.latencies[1]
    assert len(run.latencies) == 5
    assert 0 < max(run.latencies) <= run.seconds
    assert run.stages_ms == {}


@pytest.mark.parametrize("word", ["in flight", "at once"])
def test_as_many_calls_as_asked_for_are_in_flight(word: str) -> None:
    # Each call waits until three are there; with fewer in flight, the barrier breaks.
    barrier = threading.Barrier(3, timeout=30)
    run = Fake(before=barrier.wait).run(FILES, Load(3, word), GREEDY)
    assert run.token_ids == [(number, 0, 1) for number in range(6)]
    assert len(run.latencies) == 6
    assert 0 < max(run.latencies) <= run.seconds


def test_as_many_of_a_load_as_asked_for_are_streamed() -> None:
    run = Fake().run(FILES, Load(3, "in flight", streams=1), GREEDY)
    assert [streamed for _, streamed, _ in run.token_ids] == [1, 0, 0] * 2


def test_a_run_tells_what_each_stage_took_of_an_image() -> None:
    stages = iter(({"engine": 1.0}, {"engine": 4.0, "image": 0.6}))
    run = Fake(stages).run(FILES, Load(1, "in flight"), GREEDY)
    assert run.stages_ms == pytest.approx({"engine": 500.0, "image": 100.0})


class InBulk(Fake):
    """Has a captioner besides."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeCaptioner()

    def captioner(self) -> Captioner:
        return self.fake


def test_equal_files_are_all_captioned_in_bulk_and_in_their_order() -> None:
    system = InBulk()
    run = system.run([b"a", b"b", b"a"], Load(16, IN_BULK), GREEDY)
    assert sorted(system.fake.seen) == [b"a0", b"a2", b"b1"]
    assert run.token_ids == [tuple(file) for file in (b"a0", b"b1", b"a2")]
    assert run.latencies == [run.seconds] * 3
    assert str(Load(16, IN_BULK)) == "in bulk"


def test_a_file_that_fails_in_bulk_ends_the_run() -> None:
    with pytest.raises(OSError, match="unreadable"):
        InBulk().run([b"bad"], Load(16, IN_BULK), GREEDY)
