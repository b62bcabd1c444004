"""caption_many of both clients against a real gRPC server."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from captionserve import (
    AsyncCaptionClient,
    CaptionClient,
    CaptionError,
    Outcome,
    _many,
    _retry,
)
from captionserve.v1 import caption_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

from tests.unit.client.caption_server import (
    WAIT_SECONDS,
    RecordingServicer,
    abort,
    answer_in_turn,
    drain,
    failure_of,
    result_of,
    rich_status,
    unused_address,
    window,
)

Server = tuple[str, RecordingServicer]
Requests = Iterator[caption_pb2.CaptionManyRequest]
Responses = Iterator[caption_pb2.CaptionManyResponse]
Many = Callable[..., list[Outcome]]


def many_blocking(target: str, images: Iterable[Any], **arguments: Any) -> list[Outcome]:
    with CaptionClient(target) as client:
        return list(client.caption_many(images, **arguments))


def many_async(target: str, images: Iterable[Any], **arguments: Any) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with AsyncCaptionClient(target) as client:
            return [outcome async for outcome in client.caption_many(images, **arguments)]

    return asyncio.run(run())


@pytest.fixture(params=[many_blocking, many_async])
def many(request: pytest.FixtureRequest) -> Many:
    """All outcomes of one caption_many with a client of its own."""
    call: Many = request.param
    return call


def images(count: int) -> list[bytes]:
    return [f"image {number}".encode() for number in range(count)]


def texts(outcomes: list[Outcome]) -> list[str]:
    return [outcome.result.text for outcome in outcomes if outcome.result is not None]


def retry_soon() -> error_details_pb2.RetryInfo:
    return error_details_pb2.RetryInfo(retry_delay=Duration(nanos=10_000_000))


def test_each_image_has_its_outcome_in_order(server: Server, many: Many) -> None:
    outcomes = many(server[0], images(50))
    assert [outcome.index for outcome in outcomes] == list(range(50))
    assert texts(outcomes) == [f"image {number}" for number in range(50)]
    assert all(outcome.error is None for outcome in outcomes)


def test_what_is_asked_of_an_image_is_asked_of_each(server: Server, many: Many) -> None:
    target, servicer = server
    servicer.many = servicer.answer_each
    many(target, images(3), regions=[(0, 0, 1, 1)], tiles=(1, 2), resize="letterbox")
    assert len(servicer.requests) == 3
    for request in servicer.requests:
        assert (len(request.regions), request.tiles.cols) == (1, 2)
        assert request.resize == caption_pb2.RESIZE_LETTERBOX


def test_no_images_are_no_call(server: Server, many: Many) -> None:
    target, servicer = server
    assert many(target, []) == []
    assert servicer.metadata == []


def test_outcomes_come_as_they_are_finished_where_order_is_not_wanted(
    server: Server, many: Many
) -> None:
    target, servicer = server

    def backwards(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield window(3)
        yield from map(result_of, reversed(list(itertools.islice(requests, 3))))

    servicer.many = backwards
    outcomes = many(target, images(3), ordered=False)
    assert [outcome.index for outcome in outcomes] == [2, 1, 0]
    servicer.many = backwards
    assert [outcome.index for outcome in many(target, images(3))] == [0, 1, 2]


def test_the_servers_window_is_kept(server: Server, many: Many) -> None:
    target, servicer = server
    taken: list[int] = []

    def in_twos(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield window(2)
        unanswered: list[caption_pb2.CaptionManyRequest] = []
        for item in requests:
            unanswered.append(item)
            taken.append(len(unanswered))
            if len(unanswered) == 2:
                yield from map(result_of, unanswered)
                unanswered.clear()

    servicer.many = in_twos
    assert len(texts(many(target, images(10)))) == 10
    assert max(taken) == 2


@pytest.mark.parametrize("ordered", [True, False])
def test_images_are_pulled_as_there_is_room(ordered: bool, server: Server, many: Many) -> None:
    pulled = 0

    def endless() -> Iterator[bytes]:
        nonlocal pulled
        while True:
            pulled += 1
            yield b"an image"

    with CaptionClient(server[0]) as client:
        outcomes = client.caption_many(endless(), window=5, ordered=ordered)
        for number in range(1, 20):
            next(outcomes)
            assert pulled <= number + 5
        outcomes.close()


def test_an_image_that_cannot_be_read_is_its_own_error(server: Server, many: Many) -> None:
    given = [b"image 0", "/no/such/file", 7, b"image 3"]
    outcomes = many(server[0], given)
    assert [type(outcome.error) for outcome in outcomes] == [
        type(None),
        FileNotFoundError,
        TypeError,
        type(None),
    ]
    assert texts(outcomes) == ["image 0", "image 3"]


def test_an_items_own_error_is_its_outcome(server: Server, many: Many) -> None:
    target, servicer = server
    corrupt = error_details_pb2.ErrorInfo(reason="IMAGE_CORRUPT", domain="captionserve")

    def refuse_odd(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield window()
        for item in requests:
            odd = int(item.id) % 2
            invalid = grpc.StatusCode.INVALID_ARGUMENT
            yield failure_of(item, invalid, corrupt) if odd else result_of(item)

    servicer.many = refuse_odd
    outcomes = many(target, images(4))
    errors = [outcome.error for outcome in outcomes]
    assert [isinstance(error, CaptionError) for error in errors] == [False, True, False, True]
    assert {error.reason for error in errors if isinstance(error, CaptionError)} == {
        "IMAGE_CORRUPT"
    }


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "MODEL_UNAVAILABLE"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    ],
)
def test_an_item_is_tried_again(
    code: grpc.StatusCode, reason: str, server: Server, many: Many
) -> None:
    target, servicer = server
    info = error_details_pb2.ErrorInfo(reason=reason, domain="captionserve")
    seen: list[str] = []

    def fail_first(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield window()
        for item in requests:
            again = item.id in seen
            seen.append(item.id)
            yield result_of(item) if again else failure_of(item, code, info, retry_soon())

    servicer.many = fail_first
    outcomes = many(target, images(6))
    assert texts(outcomes) == [f"image {number}" for number in range(6)]
    assert sorted(seen) == sorted(2 * [str(number) for number in range(6)])


def test_a_broken_call_is_resumed_without_loss_or_repetition(server: Server, many: Many) -> None:
    target, servicer = server

    def break_after_three(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield window()
        yield from map(result_of, itertools.islice(requests, 3))
        next(requests, None)
        abort(context, grpc.StatusCode.UNAVAILABLE, b"")

    servicer.many = break_after_three
    outcomes = many(target, images(14))
    assert [outcome.index for outcome in outcomes] == list(range(14))
    assert texts(outcomes) == [f"image {number}" for number in range(14)]


@pytest.mark.parametrize("ending", ["refused", "drained"])
def test_calls_that_come_to_nothing_follow_each_other_slowly(
    ending: str, server: Server, many: Many
) -> None:
    target, servicer = server

    def end(requests: Requests, context: grpc.ServicerContext) -> Responses:
        if ending == "refused":
            abort(context, grpc.StatusCode.UNAVAILABLE, b"")
        yield window()
        yield drain()

    servicer.many = end
    outcomes = many(target, images(3), timeout=1.0)
    assert [outcome.result for outcome in outcomes] == [None] * 3
    assert 1 < len(servicer.metadata) < 10


def test_a_call_is_ended_well(server: Server, many: Many) -> None:
    target, servicer = server
    ended = threading.Event()

    def answer(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield from answer_in_turn(requests, context)
        ended.set()

    servicer.many = answer
    many(target, images(3))
    assert ended.wait(WAIT_SECONDS)


def test_an_image_that_is_too_large_for_the_server_harms_no_other(
    server: Server, many: Many
) -> None:
    target, servicer = server

    def small(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield window(message_bytes=1000)
        yield from map(result_of, requests)

    servicer.many = small
    outcomes = many(target, [b"image 0", bytes(1000), b"image 2"])
    assert texts(outcomes) == ["image 0", "image 2"]
    assert isinstance(outcomes[1].error, CaptionError)
    assert outcomes[1].error.reason == "IMAGE_TOO_LARGE"


def test_an_outcome_does_not_wait_for_the_next_image(server: Server) -> None:
    given = threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"image 0"
        assert given.wait(WAIT_SECONDS)
        yield b"image 1"

    with CaptionClient(server[0]) as client:
        outcomes = []
        for outcome in client.caption_many(slow()):
            outcomes.append(outcome)
            given.set()
    assert texts(outcomes) == ["image 0", "image 1"]

    async def run() -> list[Outcome]:
        given = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"image 0"
            await asyncio.wait_for(given.wait(), WAIT_SECONDS)
            yield b"image 1"

        outcomes = []
        async with AsyncCaptionClient(server[0]) as client:
            async for outcome in client.caption_many(slow()):
                outcomes.append(outcome)
                given.set()
        return outcomes

    assert texts(asyncio.run(run())) == ["image 0", "image 1"]


def test_a_caller_who_is_away_for_long_misses_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + away)
    for module in (_many, _retry):
        monkeypatch.setattr(module, "time", clock)
    outcomes = []
    with CaptionClient(server[0], timeout=WAIT_SECONDS) as client:
        for outcome in client.caption_many(images(10), window=3):
            outcomes.append(outcome)
            away += 10 * WAIT_SECONDS
    assert texts(outcomes) == [f"image {number}" for number in range(10)]

    async def run() -> list[Outcome]:
        nonlocal away
        outcomes = []
        async with AsyncCaptionClient(server[0], timeout=WAIT_SECONDS) as client:
            async for outcome in client.caption_many(images(10), window=3):
                outcomes.append(outcome)
                away += 10 * WAIT_SECONDS
        return outcomes

    assert texts(asyncio.run(run())) == [f"image {number}" for number in range(10)]


@pytest.mark.parametrize("kind", [LookupError, queue.Empty, asyncio.TimeoutError])
def test_what_pulling_raises_is_raised(kind: type[Exception], server: Server, many: Many) -> None:
    def broken() -> Iterator[bytes]:
        yield b"image 0"
        raise kind("no more")

    with pytest.raises(kind, match="no more"):
        many(server[0], broken())


def test_a_server_that_drains_is_left_in_peace(server: Server, many: Many) -> None:
    target, servicer = server
    left: list[int] = []

    def drain_after_three(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield window()
        yield from map(result_of, itertools.islice(requests, 3))
        yield drain()
        rest = 0
        for item in requests:
            rest += 1
            yield result_of(item)
        left.append(rest)

    servicer.many = drain_after_three
    outcomes = many(target, images(20))
    assert texts(outcomes) == [f"image {number}" for number in range(20)]
    assert len(left) > 1
    assert max(left) <= 4, "only what was sent before it was heard of"


def test_what_no_call_will_do_better_is_raised(server: Server, many: Many) -> None:
    target, servicer = server

    def refuse(requests: Requests, context: grpc.ServicerContext) -> Responses:
        abort(
            context, grpc.StatusCode.UNAUTHENTICATED, rich_status(grpc.StatusCode.UNAUTHENTICATED)
        )
        yield window()

    servicer.many = refuse
    with pytest.raises(CaptionError) as raised:
        many(target, images(3))
    assert raised.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_each_image_has_its_own_deadline(many: Many) -> None:
    outcomes = many(unused_address(), images(3), timeout=0.5)
    assert [outcome.index for outcome in outcomes] == [0, 1, 2]
    for outcome in outcomes:
        assert isinstance(outcome.error, CaptionError)
        assert outcome.error.code is grpc.StatusCode.UNAVAILABLE


def test_a_server_that_does_not_answer_is_not_waited_for(server: Server, many: Many) -> None:
    target, servicer = server

    def silent(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield window()
        servicer.tell_of_the_end(context)
        servicer.ended.wait(WAIT_SECONDS)

    servicer.many = silent
    (outcome,) = many(target, images(1), timeout=0.2)
    assert isinstance(outcome.error, CaptionError)
    assert outcome.error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert servicer.ended.wait(WAIT_SECONDS)


@pytest.mark.parametrize(("argument", "value"), [("window", 0), ("timeout", 0.0)])
def test_arguments_are_checked(argument: str, value: float, server: Server, many: Many) -> None:
    with pytest.raises(ValueError, match=argument):
        many(server[0], images(1), **{argument: value})


def test_images_may_come_from_an_asynchronous_iterable(server: Server) -> None:
    async def run() -> list[Outcome]:
        async def coming() -> Any:
            for image in images(5):
                await asyncio.sleep(0)
                yield image

        async with AsyncCaptionClient(server[0]) as client:
            return [outcome async for outcome in client.caption_many(coming())]

    assert texts(asyncio.run(run())) == [f"image {number}" for number in range(5)]
