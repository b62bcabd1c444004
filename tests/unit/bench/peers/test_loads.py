"""Batches and calls in flight: how many at once, which are streamed, and what is told of them."""

from __future__ import annotations

import os
import threading

import pytest
from captionserve_server.bench.peers.loads import (
    CalledPeer,
    run_in_batches,
    run_in_flight,
    stages_ms,
)
from captionserve_server.bench.rows import Load, Options, TokenIds

FILES = [b"0", b"1", b"2"]


def tokens(file: bytes) -> TokenIds:
    return (int(file),)


def test_files_come_round_again_in_batches() -> None:
    batches: list[list[bytes]] = []

    def caption(files: list[bytes]) -> list[TokenIds]:
        batches.append(files)
        return [tokens(file) for file in files]

    run = run_in_batches(caption, FILES, 5, Load(2, "batch"))
    assert batches == [[b"0", b"1"], [b"2", b"0"], [b"1"]]
    assert run.token_ids == [(0,), (1,), (2,), (0,), (1,)]
    assert run.latencies[0] == run.latencies[1]
    assert len(run.latencies) == 5
    assert 0 < max(run.latencies) <= run.seconds


def test_as_many_calls_as_asked_for_are_in_flight() -> None:
    # Each call waits until three are there; with fewer in flight, the barrier breaks.
    barrier = threading.Barrier(3, timeout=30)

    def caption(file: bytes, streamed: bool) -> TokenIds:
        barrier.wait()
        return tokens(file)

    run = run_in_flight(caption, FILES, 6, Load(3, "in flight"))
    assert run.token_ids == [(0,), (1,), (2,)] * 2
    assert len(run.latencies) == 6
    assert 0 < max(run.latencies) <= run.seconds


def test_as_many_of_a_load_as_asked_for_are_streamed() -> None:
    def caption(file: bytes, streamed: bool) -> TokenIds:
        return (int(streamed),)

    run = run_in_flight(caption, FILES, 8, Load(4, "in flight", streams=1))
    assert run.token_ids == [(1,), (0,), (0,), (0,)] * 2


def test_a_called_peer_tells_what_each_stage_took_of_an_image() -> None:
    clock = iter(({"engine": 1.0}, {"engine": 3.0, "image": 0.5}))

    def caption(file: bytes, options: Options, streamed: bool) -> TokenIds:
        return (*tokens(file), options["num_beams"])

    peer = CalledPeer(os.getpid(), {}, caption, FILES, stage_seconds=lambda: next(clock))
    run = peer.run(4, Load(1, "in flight"), {"num_beams": 2})
    assert run.token_ids == [(0, 2), (1, 2), (2, 2), (0, 2)]
    assert run.stages_ms == {"engine": 500.0, "image": 125.0}


def test_a_stage_that_had_not_begun_took_no_time_before() -> None:
    assert stages_ms({}, {"top": 0.5}, 2) == pytest.approx({"top": 250.0})
