"""When both clients try again, and when they do not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
import pytest
from captionserve import AsyncCaptionClient, CaptionClient, CaptionError, CaptionResult
from captionserve._retry import Attempts, RetryBudget
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from google.protobuf.any_pb2 import Any as PackedAny
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.client.caption_server import (
    WAIT_SECONDS,
    RecordingServicer,
    abort,
    good_response,
    rich_status,
    unused_address,
)
from tests.unit.client.test_calls import call_async, call_blocking

Server = tuple[str, RecordingServicer]
Call = Callable[..., CaptionResult]
IMAGE = b"an image"
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture(params=[call_blocking, call_async])
def caption(request: pytest.FixtureRequest) -> Call:
    """One call with a client of its own."""
    call: Call = request.param
    return call


def failing(servicer: RecordingServicer, times: int, code: grpc.StatusCode, raw: bytes) -> None:
    """Let so many calls fail, and the others succeed."""

    def answer(
        request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
    ) -> caption_pb2.CaptionResponse:
        if len(servicer.requests) <= times:
            abort(context, code, raw)
        return good_response()

    servicer.answer = answer


def retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(int(1e3 * seconds))
    return error_details_pb2.RetryInfo(retry_delay=delay)


@pytest.mark.parametrize("size", [10, 3_000_000])
def test_unavailable_is_waited_out_whatever_the_size(
    size: int, server: Server, caption: Call
) -> None:
    target, servicer = server
    failing(servicer, 6, UNAVAILABLE, rich_status(UNAVAILABLE, retry_info(0.01)))
    assert caption(target, bytes(size), client={}).text == "a red apple"
    assert len(servicer.requests) == 7
    assert {entry["captionserve-request-bytes"] for entry in servicer.metadata} == {
        str(servicer.requests[0].ByteSize())
    }


def test_the_delay_that_the_server_asks_for_is_kept(server: Server, caption: Call) -> None:
    target, servicer = server
    failing(servicer, 1, UNAVAILABLE, rich_status(UNAVAILABLE, retry_info(0.5)))
    begin = time.monotonic()
    caption(target, IMAGE, client={})
    assert time.monotonic() - begin >= 0.5


def test_when_the_time_is_up_the_last_error_is_raised(server: Server, caption: Call) -> None:
    target, servicer = server
    failing(servicer, 1000, UNAVAILABLE, rich_status(UNAVAILABLE, retry_info(0.1)))
    begin = time.monotonic()
    with pytest.raises(CaptionError) as raised:
        caption(target, IMAGE, client={}, timeout=2.0)
    assert raised.value.code is UNAVAILABLE
    assert raised.value.retry_after == pytest.approx(0.1)
    assert len(servicer.requests) > 1
    assert time.monotonic() - begin < WAIT_SECONDS


@pytest.mark.parametrize(
    "code",
    [
        code
        for code in grpc.StatusCode
        if code not in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    ],
)
def test_nothing_else_is_tried_again(code: grpc.StatusCode, server: Server, caption: Call) -> None:
    target, servicer = server
    failing(servicer, 1000, code, rich_status(code, retry_info(0.01)))
    with pytest.raises(CaptionError):
        caption(target, IMAGE, client={})
    assert len(servicer.requests) == 1


def test_who_begins_to_listen_later_is_found(caption: Call) -> None:
    target = unused_address()
    servicer = RecordingServicer()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    caption_pb2_grpc.add_CaptionServiceServicer_to_server(servicer, server)
    with futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(caption, target, IMAGE, client={}, timeout=WAIT_SECONDS)
        with pytest.raises(futures.TimeoutError):
            call.result(0.5)
        server.add_insecure_port(target)
        server.start()
        try:
            assert call.result(WAIT_SECONDS).text == "a red apple"
        finally:
            server.stop(None).wait()


@pytest.mark.parametrize("hard", [b"\xff\xff\xff", b"\x0a\xff"])
def test_a_malformed_detail_of_another_server_is_ignored(
    hard: bytes, server: Server, caption: Call
) -> None:
    target, servicer = server
    status = status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message="a sentence")
    for name in ("ErrorInfo", "BadRequest", "RetryInfo"):
        status.details.append(
            PackedAny(type_url=f"type.googleapis.com/google.rpc.{name}", value=hard)
        )
    failing(servicer, 1000, grpc.StatusCode.INTERNAL, status.SerializeToString())
    with pytest.raises(CaptionError) as raised:
        caption(target, IMAGE, client={})
    assert (raised.value.reason, raised.value.retry_after) == ("INTERNAL", None)


def test_a_call_on_a_closed_client_fails_alike(server: Server) -> None:
    blocking = CaptionClient(server[0])
    blocking.close()
    errors = []
    for call in (blocking.caption, blocking.caption_stream):
        with pytest.raises(CaptionError) as raised:
            list(call(IMAGE))  # type: ignore[arg-type]
        errors.append(raised.value)
    with pytest.raises(CaptionError) as raised:
        list(blocking.caption_many([IMAGE]))
    errors.append(raised.value)

    async def run() -> None:
        client = AsyncCaptionClient(server[0])
        await client.close()
        with pytest.raises(CaptionError) as raised:
            await client.caption(IMAGE)
        errors.append(raised.value)
        for stream in (client.caption_stream(IMAGE), client.caption_many([IMAGE])):
            with pytest.raises(CaptionError) as raised:
                async for _ in stream:
                    pass
            errors.append(raised.value)

    asyncio.run(run())
    assert {(error.code, error.reason) for error in errors} == {
        (grpc.StatusCode.CANCELLED, "CLIENT_CLOSED")
    }
    assert len(errors) == 6


@pytest.mark.parametrize("waiting", ["for the answer", "for the next attempt"])
def test_closing_during_a_call_fails_it_alike(waiting: str, server: Server) -> None:
    target, servicer = server
    arrived = threading.Event()

    def answer(
        request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
    ) -> caption_pb2.CaptionResponse:
        arrived.set()
        if waiting == "for the next attempt":
            abort(context, UNAVAILABLE, rich_status(UNAVAILABLE, retry_info(WAIT_SECONDS)))
        return servicer.wait_until_gone(request, context)

    servicer.answer = answer
    client = CaptionClient(target, timeout=2 * WAIT_SECONDS)
    with futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.caption, IMAGE)
        assert arrived.wait(WAIT_SECONDS)
        client.close()
        error = call.exception(WAIT_SECONDS)
    assert isinstance(error, CaptionError)
    assert error.reason == "CLIENT_CLOSED"

    async def run() -> BaseException | None:
        arrived.clear()
        servicer.ended.clear()
        client = AsyncCaptionClient(target, timeout=2 * WAIT_SECONDS)
        task = asyncio.create_task(client.caption(IMAGE))
        assert await asyncio.to_thread(arrived.wait, WAIT_SECONDS)
        await client.close()
        await asyncio.wait([task], timeout=WAIT_SECONDS)
        return task.exception()

    error = asyncio.run(run())
    assert isinstance(error, CaptionError)
    assert error.reason == "CLIENT_CLOSED"


def test_attempts_of_one_client_are_kept_apart() -> None:
    budget = RetryBudget()
    granted = [budget.earliest(5.0) for _ in range(3)]
    assert granted == pytest.approx([5.0, 5.05, 5.1])
    assert budget.earliest(9.0) == 9.0


@given(
    seconds=st.floats(0.001, 5.0),
    asked=st.lists(st.none() | st.floats(0.0, 2.0), min_size=1, max_size=20),
)
def test_no_attempt_is_made_after_the_deadline(seconds: float, asked: list[Any]) -> None:
    attempts = Attempts(RetryBudget(), seconds)
    end = time.monotonic() + seconds
    for retry_after in asked:
        error = CaptionError(UNAVAILABLE, "UNAVAILABLE", "restarting", retry_after=retry_after)
        try:
            delay = attempts.delay_after(error)
        except CaptionError:
            continue
        assert delay >= (0.0 if retry_after is None else retry_after) - 1e-6
        assert time.monotonic() + delay <= end + 0.01
