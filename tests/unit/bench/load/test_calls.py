"""Calls are made when they are due, once each, from a process of their own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from types import SimpleNamespace

import grpc
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.bench.load import calls
from captionserve_server.bench.load.arrivals import Arrival
from captionserve_server.bench.load.calls import Offered, Service, generator, in_time, request_of

from tests.unit.client.caption_server import WAIT_SECONDS, caption_server, good_response

IMAGES = (b"first", b"second")
ARRIVALS = [Arrival(number / 100, number % 2, repeated=number % 3 == 0) for number in range(30)]


def test_no_call_waits_for_another() -> None:
    last = asyncio.Event()
    begun: list[int] = []

    async def call(number: int, when: float) -> None:
        begun.append(number)
        if number == 9:
            last.set()
        # In a closed loop the last would never come.
        await asyncio.wait_for(last.wait(), WAIT_SECONDS)

    asyncio.run(in_time([time.monotonic()] * 10, call))
    assert sorted(begun) == list(range(10))


def test_a_call_that_is_late_knows_when_it_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        nonlocal now
        wakes = now + seconds
        await real_sleep(0)
        now = max(now, wakes)

    monkeypatch.setattr(calls, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(asyncio, "sleep", sleep)
    made: list[tuple[int, float, float]] = []

    async def call(number: int, when: float) -> None:
        nonlocal now
        made.append((number, when, now))
        if number == 1:
            # The generator is held up.
            now += 5.0

    asyncio.run(in_time([101.0, 102.0, 103.0, 110.0], call))
    assert made == [(0, 101.0, 101.0), (1, 102.0, 102.0), (2, 103.0, 107.0), (3, 110.0, 110.0)]


def offered(target: str, connections: int = 2, deadline: float = 20.0) -> Offered:
    service = Service(target, token="secret")
    options = {"num_beams": 3}
    with generator(service, IMAGES, options, connections=connections, deadline=deadline) as offer:
        return offer(ARRIVALS)


def test_each_arrival_is_one_call_from_another_process() -> None:
    peers: set[str] = set()

    def answer(
        request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
    ) -> caption_pb2.CaptionResponse:
        peers.add(context.peer())
        return caption_pb2.CaptionResponse(cached=not request.bypass_cache)

    with caption_server() as (target, servicer):
        servicer.answer = answer
        found = offered(target, connections=3)
    assert len(peers) == 3
    asked = Counter((each.image.encoded, each.bypass_cache) for each in servicer.requests)
    assert asked == Counter((IMAGES[each.image], not each.repeated) for each in ARRIVALS)
    assert {each.options.num_beams for each in servicer.requests} == {3}
    assert {each["authorization"] for each in servicer.metadata} == {"Bearer secret"}
    sizes = {int(each["captionserve-request-bytes"]) for each in servicer.metadata}
    assert sizes == {each.ByteSize() for each in servicer.requests}
    assert sorted(call.due for call in found.calls) == pytest.approx(
        [each.due for each in ARRIVALS]
    )
    assert Counter(call.code for call in found.calls) == {"OK": len(ARRIVALS)}
    assert sum(call.cached for call in found.calls) == sum(each.repeated for each in ARRIVALS)
    # A loop's timer may be early by its clock's resolution.
    assert all(call.due - 1e-6 <= call.sent <= call.ended for call in found.calls)
    assert found.seconds >= max(call.ended for call in found.calls)
    assert 0 < found.cpu_seconds < found.seconds * (os.cpu_count() or 1)
    # gRPC rounds up what it sends.
    assert all(left is not None and left < 21 for left in servicer.seconds_left)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
def test_what_fails_is_counted_and_not_tried_again(code: grpc.StatusCode) -> None:
    def refuse_others(
        request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
    ) -> caption_pb2.CaptionResponse:
        if request.image.encoded == IMAGES[1]:
            context.abort(code, "no")
        return good_response()

    with caption_server() as (target, servicer):
        servicer.answer = refuse_others
        found = offered(target)
    assert len(servicer.requests) == len(ARRIVALS)
    assert Counter(call.code for call in found.calls) == {"OK": 15, code.name: 15}


def test_a_call_that_is_not_answered_ends_with_its_deadline() -> None:
    ended = threading.Event()

    def wait(
        request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
    ) -> caption_pb2.CaptionResponse:
        ended.wait(WAIT_SECONDS)
        return good_response()

    with caption_server() as (target, servicer):
        servicer.answer = wait
        found = offered(target, deadline=0.5)
        ended.set()
    assert {call.code for call in found.calls} == {"DEADLINE_EXCEEDED"}


class _InterruptedError(Exception):
    pass


def test_who_is_interrupted_does_not_wait_for_the_load() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise _InterruptedError

    def answer(
        request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
    ) -> caption_pb2.CaptionResponse:
        os.kill(os.getpid(), signal.SIGUSR1)
        return good_response()

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with caption_server() as (target, servicer):
            servicer.answer = answer
            service = Service(target)
            with (
                pytest.raises(_InterruptedError),
                generator(service, IMAGES, {}, connections=1, deadline=20.0) as offer,
            ):
                offer([Arrival(0.0, 0, repeated=False), Arrival(3600.0, 0, repeated=False)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert multiprocessing.active_children() == []


def test_addresses_behind_one_target_are_asked_in_turn() -> None:
    with caption_server() as (first, one), caption_server() as (second, other):
        offered(f"ipv4:{first},{second}", connections=1)
        counts = [len(each.requests) for each in (one, other)]
    assert sum(counts) == len(ARRIVALS)
    # The first calls may find only one of them connected.
    assert min(counts) > len(ARRIVALS) // 4


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(Service("127.0.0.1:1", token="secret"))


def test_only_repeated_calls_are_answered_from_memory() -> None:
    for repeated in (False, True):
        message = request_of(b"image", repeated=repeated, options={})
        assert caption_pb2.CaptionRequest.FromString(message).bypass_cache is not repeated
