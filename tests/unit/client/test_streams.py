"""Streams of both clients: updates in order, errors within the loop, and leaving early."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import grpc
import pytest
from captionserve import (
    AsyncCaptionClient,
    BeamFate,
    CaptionClient,
    CaptionError,
    CaptionUpdate,
    Continuation,
    GenerationOptions,
)
from captionserve._transport import DEFAULT_TIMEOUT_SECONDS
from captionserve.v1 import caption_pb2
from google.rpc import error_details_pb2

from tests.unit.client.caption_server import (
    WAIT_SECONDS,
    RecordingServicer,
    abort,
    good_stream,
    rich_status,
)
from tests.unit.client.test_calls import IMAGE, WHOLE

Server = tuple[str, RecordingServicer]
# One stream with a client of its own: its updates, and the error that came after them.
Collect = Callable[..., tuple[list[CaptionUpdate], Exception | None]]


def collect_blocking(target: str, **call: Any) -> tuple[list[CaptionUpdate], Exception | None]:
    updates: list[CaptionUpdate] = []
    with CaptionClient(target) as client:
        try:
            for update in client.caption_stream(IMAGE, **call):
                updates.append(update)  # noqa: PERF402 - what came before an error must be kept.
        except (CaptionError, TypeError, ValueError) as error:
            return updates, error
    return updates, None


def collect_async(target: str, **call: Any) -> tuple[list[CaptionUpdate], Exception | None]:
    updates: list[CaptionUpdate] = []

    async def run() -> Exception | None:
        async with AsyncCaptionClient(target) as client:
            try:
                async for update in client.caption_stream(IMAGE, **call):
                    updates.append(update)  # noqa: PERF401 - as above.
            except (CaptionError, TypeError, ValueError) as error:
                return error
        return None

    return updates, asyncio.run(run())


@pytest.fixture(params=[collect_blocking, collect_async])
def collect(request: pytest.FixtureRequest) -> Collect:
    collected: Collect = request.param
    return collected


def test_words_come_in_their_order_and_the_result_last(server: Server, collect: Collect) -> None:
    updates, error = collect(server[0])
    assert error is None
    assert updates == [
        CaptionUpdate("a red", (5,), None),
        CaptionUpdate(" apple", (6,), None),
        CaptionUpdate("", (2,), None),
        CaptionUpdate("", (), WHOLE),
    ]


def test_image_and_options_are_sent(server: Server, collect: Collect) -> None:
    target, servicer = server
    collect(target)
    collect(target, options=GenerationOptions(num_beams=4, bad_words=["cat"]))
    image = caption_pb2.Image(encoded=IMAGE)
    options = caption_pb2.GenerationOptions(
        num_beams=4, bad_words=caption_pb2.StringList(values=["cat"])
    )
    assert servicer.requests == [
        caption_pb2.CaptionRequest(image=image),
        caption_pb2.CaptionRequest(image=image, options=options),
    ]


def test_what_is_asked_of_the_image_is_sent(server: Server, collect: Collect) -> None:
    target, servicer = server
    collect(target, tiles=(2, 3), resize="center_crop")
    (request,) = servicer.requests
    assert (request.tiles.rows, request.tiles.cols) == (2, 3)
    assert request.resize == caption_pb2.RESIZE_CENTER_CROP


def test_every_stream_has_a_deadline(server: Server, collect: Collect) -> None:
    target, servicer = server
    collect(target)
    collect(target, timeout=7.0)
    for seconds_left, allowed in zip(
        servicer.seconds_left, (DEFAULT_TIMEOUT_SECONDS, 7.0), strict=True
    ):
        assert seconds_left is not None
        # gRPC rounds what it sends up, long times more coarsely.
        assert 0 < seconds_left <= 1.05 * allowed + 1


def test_the_deadline_ends_a_stream_on_both_sides(server: Server, collect: Collect) -> None:
    target, servicer = server
    servicer.stream = servicer.one_part_and_no_more
    _, error = collect(target, timeout=0.5)
    assert isinstance(error, CaptionError)
    assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.reason == "DEADLINE_EXCEEDED"
    assert servicer.ended.wait(WAIT_SECONDS)


@pytest.mark.parametrize(
    ("call", "error_type"),
    [
        ({"timeout": 0.0}, ValueError),
        ({"options": GenerationOptions(seed=2**63)}, CaptionError),
        ({"options": GenerationOptions(bad_words="red")}, CaptionError),
    ],
)
def test_what_cannot_be_sent_is_refused(
    server: Server, collect: Collect, call: Any, error_type: type[Exception]
) -> None:
    target, servicer = server
    updates, error = collect(target, **call)
    assert type(error) is error_type
    assert (updates, servicer.requests) == ([], [])


def test_an_error_comes_after_the_words_before_it(server: Server, collect: Collect) -> None:
    target, servicer = server
    code = grpc.StatusCode.INTERNAL
    info = error_details_pb2.ErrorInfo(reason="MODEL_FAULT", domain="captionserve")

    def fail_late(
        request: object, context: grpc.ServicerContext
    ) -> Iterator[caption_pb2.StreamCaptionResponse]:
        yield from good_stream()[:2]
        abort(context, code, rich_status(code, info))

    servicer.stream = fail_late
    updates, error = collect(target)
    assert [update.text for update in updates] == ["a red", " apple"]
    assert isinstance(error, CaptionError)
    assert (error.code, error.reason, error.message) == (code, "MODEL_FAULT", "a sentence")


def test_unavailable_is_tried_again_before_the_first_word(server: Server, collect: Collect) -> None:
    target, servicer = server

    def fail_once(
        request: object, context: grpc.ServicerContext
    ) -> Iterator[caption_pb2.StreamCaptionResponse]:
        if len(servicer.requests) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        yield from good_stream()

    servicer.stream = fail_once
    updates, error = collect(target)
    assert error is None
    assert len(updates) == len(good_stream())
    assert len(servicer.requests) == 2


def breaking_off(
    servicer: RecordingServicer,
    *streams: list[caption_pb2.StreamCaptionResponse],
) -> None:
    """Say one of these in each call; break off at the end of all but the last."""

    def said(
        request: object, context: grpc.ServicerContext
    ) -> Iterator[caption_pb2.StreamCaptionResponse]:
        call = len(servicer.requests)
        yield from streams[call - 1]
        if call < len(streams):
            context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")

    servicer.stream = said


def part(text: str, *token_ids: int) -> caption_pb2.StreamCaptionResponse:
    return caption_pb2.StreamCaptionResponse(
        part=caption_pb2.CaptionPart(text=text, token_ids=token_ids)
    )


@pytest.mark.parametrize("given", range(4))
def test_a_stream_goes_on_where_it_broke_off(server: Server, collect: Collect, given: int) -> None:
    target, servicer = server
    breaking_off(servicer, good_stream()[:given], good_stream()[: max(0, given - 1)], good_stream())
    updates, error = collect(target)
    assert error is None
    assert updates == [
        CaptionUpdate("a red", (5,), None),
        CaptionUpdate(" apple", (6,), None),
        CaptionUpdate("", (2,), None),
        CaptionUpdate("", (), WHOLE),
    ]
    assert len(servicer.requests) == 3


def test_words_may_come_in_other_parts_the_next_time(server: Server, collect: Collect) -> None:
    target, servicer = server
    breaking_off(
        servicer, [part("a red", 5)], [part("a", 5), part(" red apple", 6), *good_stream()[2:]]
    )
    updates, error = collect(target)
    assert error is None
    assert updates[:2] == [CaptionUpdate("a red", (5,), None), CaptionUpdate(" apple", (6,), None)]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([part("a green", 5)], id="other words"),
        pytest.param([part("a red", 7)], id="other tokens"),
        pytest.param(good_stream()[3:], id="a result before its words"),
    ],
)
def test_a_stream_that_goes_on_otherwise_fails(
    server: Server, collect: Collect, other: list[caption_pb2.StreamCaptionResponse]
) -> None:
    target, servicer = server
    breaking_off(servicer, good_stream()[:1], other)
    updates, error = collect(target)
    assert [update.text for update in updates] == ["a red"]
    assert isinstance(error, CaptionError)
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "STREAM_BROKEN")
    assert len(servicer.requests) == 2


def step(*fates: str, token: int = 5, score: float = -0.5) -> caption_pb2.BeamStep:
    """A step of the search whose continuations had these fates."""
    kept = [number if fate == "KEPT" else -1 for number, fate in enumerate(fates)]
    return caption_pb2.BeamStep(
        parents=[0] * len(fates),
        token_ids=range(token, token + len(fates)),
        token_texts=["a red"] * len(fates),
        token_logprobs=[-0.25] * len(fates),
        scores=[score] * len(fates),
        fates=[caption_pb2.BeamFate.Value(f"BEAM_FATE_{fate}") for fate in fates],
        beams=kept,
    )


def searched(*steps: caption_pb2.BeamStep) -> caption_pb2.StreamCaptionResponse:
    """A part without words."""
    return caption_pb2.StreamCaptionResponse(part=caption_pb2.CaptionPart(beam_steps=steps))


FIRST, SECOND = step("KEPT", "KEPT", "DROPPED"), step("KEPT", "FINISHED", token=6)
THIRD = step("DROPPED", "FINISHED", token=2)
SEARCH = [
    searched(FIRST),
    caption_pb2.StreamCaptionResponse(
        part=caption_pb2.CaptionPart(
            text="a red apple", token_ids=[5, 6, 2], beam_steps=[SECOND, THIRD]
        )
    ),
    *good_stream()[3:],
]


def fates_of(updates: list[CaptionUpdate]) -> list[list[str]]:
    """Of each step of all updates."""
    return [[str(each.fate) for each in step] for update in updates for step in update.beam_steps]


SEARCHED = [["kept", "kept", "dropped"], ["kept", "finished"], ["dropped", "finished"]]


def test_steps_of_the_search_come_with_the_words_and_before_them(
    server: Server, collect: Collect
) -> None:
    target, servicer = server
    breaking_off(servicer, SEARCH)
    updates, error = collect(target)
    assert error is None
    assert [(update.text, len(update.beam_steps)) for update in updates] == [
        ("", 1),
        ("a red apple", 2),
        ("", 0),
    ]
    first = updates[0].beam_steps[0][0]
    assert first == Continuation(0, 5, "a red", -0.25, -0.5, BeamFate.KEPT, 0)
    assert fates_of(updates) == SEARCHED


@pytest.mark.parametrize(
    "before",
    [
        [searched(FIRST)],
        [searched(FIRST, SECOND)],
        [searched(FIRST), searched(SECOND)],
        [searched(FIRST, SECOND, THIRD)],
        SEARCH[:2],
        # Numbers may differ a little in other company, and what is dropped for little.
        [searched(step("KEPT", "KEPT", score=-0.5001))],
    ],
    ids=range(6),
)
def test_steps_that_were_given_are_not_given_again(
    server: Server, collect: Collect, before: list[caption_pb2.StreamCaptionResponse]
) -> None:
    target, servicer = server
    breaking_off(servicer, before, SEARCH)
    updates, error = collect(target)
    assert error is None
    assert fates_of(updates)[1:] == SEARCHED[1:]
    assert fates_of(updates)[0][:2] == SEARCHED[0][:2]
    assert "".join(update.text for update in updates) == "a red apple"
    assert len(servicer.requests) == 2


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([searched(step("KEPT", "KEPT", token=4))], id="other tokens"),
        pytest.param([searched(step("KEPT", "FINISHED"))], id="other fates"),
        pytest.param([searched(step("KEPT", "DROPPED", "KEPT"))], id="other beams"),
        pytest.param(good_stream()[:], id="fewer steps"),
    ],
)
def test_a_search_that_goes_on_otherwise_breaks_the_stream(
    server: Server, collect: Collect, other: list[caption_pb2.StreamCaptionResponse]
) -> None:
    target, servicer = server
    breaking_off(servicer, SEARCH[:1], other)
    updates, error = collect(target)
    assert fates_of(updates) == SEARCHED[:1]
    assert isinstance(error, CaptionError)
    assert error.reason == "STREAM_BROKEN"


class OwnError(Exception):
    """The caller's own."""


def break_out(client: CaptionClient) -> None:
    for _ in client.caption_stream(IMAGE):
        break


def close_stream(client: CaptionClient) -> None:
    stream = client.caption_stream(IMAGE)
    next(stream)
    stream.close()


def raise_in_body(client: CaptionClient) -> None:
    with suppress(OwnError):
        for _ in client.caption_stream(IMAGE):
            raise OwnError


async def break_out_async(client: AsyncCaptionClient) -> None:
    async for _ in client.caption_stream(IMAGE):
        break


async def close_stream_async(client: AsyncCaptionClient) -> None:
    stream = client.caption_stream(IMAGE)
    await anext(stream)
    await stream.aclose()


async def raise_in_body_async(client: AsyncCaptionClient) -> None:
    with suppress(OwnError):
        async for _ in client.caption_stream(IMAGE):
            raise OwnError


async def cancel_task(client: AsyncCaptionClient) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in client.caption_stream(IMAGE):
            begun.set()

    task = asyncio.create_task(read())
    await asyncio.wait_for(begun.wait(), WAIT_SECONDS)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# The server is listened to while the client is still open: closing it would end the call as well.
@pytest.mark.parametrize("leave", [break_out, close_stream, raise_in_body])
def test_leaving_a_stream_ends_the_call(
    server: Server, leave: Callable[[CaptionClient], None]
) -> None:
    target, servicer = server
    servicer.stream = servicer.one_part_and_no_more
    with CaptionClient(target, timeout=1000.0) as client:
        leave(client)
        assert servicer.ended.wait(WAIT_SECONDS)


@pytest.mark.parametrize(
    "leave", [break_out_async, close_stream_async, raise_in_body_async, cancel_task]
)
def test_leaving_an_async_stream_ends_the_call(
    server: Server, leave: Callable[[AsyncCaptionClient], Awaitable[None]]
) -> None:
    target, servicer = server
    servicer.stream = servicer.one_part_and_no_more

    async def run() -> None:
        async with AsyncCaptionClient(target, timeout=1000.0) as client:
            await leave(client)
            assert await asyncio.to_thread(servicer.ended.wait, WAIT_SECONDS)

    asyncio.run(run())
