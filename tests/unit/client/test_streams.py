"""Streams of both clients: updates in order, errors within the loop, and leaving early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from captionserve import AsyncCaptionClient, CaptionClient, CaptionError, CaptionUpdate
from captionserve.v1 import caption_pb2

from tests.unit.client.caption_server import (
    WAIT_SECONDS,
    RecordingServicer,
    caption_server,
    good_stream,
)
from tests.unit.client.test_calls import IMAGE, WHOLE

# Collects a stream's updates, at most so many of them; what is raised comes after them.
Collect = Callable[..., tuple[list[CaptionUpdate], Exception | None]]


def collect_blocking(
    target: str, most: int = 100, **call: Any
) -> tuple[list[CaptionUpdate], Exception | None]:
    updates: list[CaptionUpdate] = []
    with CaptionClient(target) as client:
        try:
            for update in client.caption_stream(IMAGE, **call):
                updates.append(update)
                if len(updates) == most:
                    break
        except CaptionError as error:
            return updates, error
    return updates, None


def collect_async(
    target: str, most: int = 100, **call: Any
) -> tuple[list[CaptionUpdate], Exception | None]:
    updates: list[CaptionUpdate] = []

    async def run() -> Exception | None:
        async with AsyncCaptionClient(target) as client:
            stream = client.caption_stream(IMAGE, **call)
            try:
                async for update in stream:
                    updates.append(update)
                    if len(updates) == most:
                        break
            except CaptionError as error:
                return error
            finally:
                await stream.aclose()
        return None

    return updates, asyncio.run(run())


@pytest.fixture(params=[collect_blocking, collect_async])
def collect(request: pytest.FixtureRequest) -> Collect:
    collected: Collect = request.param
    return collected


@pytest.fixture
def server() -> Iterator[tuple[str, RecordingServicer]]:
    with caption_server() as served:
        yield served


def test_words_come_in_their_order_and_the_result_last(
    server: tuple[str, RecordingServicer], collect: Collect
) -> None:
    updates, error = collect(server[0])
    assert error is None
    assert updates == [
        CaptionUpdate("a red", (5,), None),
        CaptionUpdate(" apple", (6,), None),
        CaptionUpdate("", (2,), None),
        CaptionUpdate("", (), WHOLE),
    ]


def test_the_request_is_sent_with_its_deadline(
    server: tuple[str, RecordingServicer], collect: Collect
) -> None:
    target, servicer = server
    collect(target, timeout=7.0)
    assert servicer.requests == [caption_pb2.CaptionRequest(image=caption_pb2.Image(encoded=IMAGE))]
    (seconds,) = servicer.seconds_left
    assert seconds is not None
    assert 0 < seconds <= 8.0


def test_an_error_comes_after_the_words_before_it(
    server: tuple[str, RecordingServicer], collect: Collect
) -> None:
    target, servicer = server

    def fail_late(
        request: object, context: grpc.ServicerContext
    ) -> Iterator[caption_pb2.StreamCaptionResponse]:
        yield good_stream()[0]
        context.abort(grpc.StatusCode.INTERNAL, "a sentence")

    servicer.stream = fail_late
    updates, error = collect(target)
    assert [update.text for update in updates] == ["a red"]
    assert isinstance(error, CaptionError)
    assert (error.code, error.message) == (grpc.StatusCode.INTERNAL, "a sentence")


def test_leaving_the_loop_cancels_the_call(
    server: tuple[str, RecordingServicer], collect: Collect
) -> None:
    target, servicer = server
    servicer.stream = servicer.one_part_and_no_more
    updates, error = collect(target, most=1)
    assert error is None
    assert len(updates) == 1
    assert servicer.ended.wait(WAIT_SECONDS)


def test_the_deadline_ends_a_stream(
    server: tuple[str, RecordingServicer], collect: Collect
) -> None:
    target, servicer = server
    servicer.stream = servicer.one_part_and_no_more
    updates, error = collect(target, timeout=0.5)
    assert len(updates) <= 1
    assert isinstance(error, CaptionError)
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert servicer.ended.wait(WAIT_SECONDS)


def test_an_exception_within_the_loop_cancels_the_call(
    server: tuple[str, RecordingServicer],
) -> None:
    target, servicer = server
    servicer.stream = servicer.one_part_and_no_more

    def use() -> None:
        with CaptionClient(target) as client:
            for _ in client.caption_stream(IMAGE):
                raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        use()
    assert servicer.ended.wait(WAIT_SECONDS)
