"""Both clients against a real gRPC server: what is sent, what comes back, how calls fail."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, get_args

import grpc
import numpy as np
import pytest
from captionserve import (
    AsyncCaptionClient,
    Attention,
    Caption,
    CaptionClient,
    CaptionError,
    CaptionResult,
    FinishReason,
    GenerationOptions,
    ReviewReason,
    Word,
    _transport,
)
from captionserve._framing import Resize
from captionserve._transport import DEFAULT_TIMEOUT_SECONDS
from captionserve.v1 import caption_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.sdk.trace import TracerProvider

from tests.unit.client.caption_server import (
    WAIT_SECONDS,
    RecordingServicer,
    abort,
    good_response,
    rich_status,
)

Server = tuple[str, RecordingServicer]
Call = Callable[..., CaptionResult]
IMAGE = b"an image"


def call_blocking(target: str, *args: Any, client: dict[str, Any], **call: Any) -> CaptionResult:
    with CaptionClient(target, **client) as opened:
        return opened.caption(*args, **call)


def call_async(target: str, *args: Any, client: dict[str, Any], **call: Any) -> CaptionResult:
    async def run() -> CaptionResult:
        async with AsyncCaptionClient(target, **client) as opened:
            return await opened.caption(*args, **call)

    return asyncio.run(run())


@pytest.fixture(params=[call_blocking, call_async])
def caption(request: pytest.FixtureRequest) -> Call:
    """One call with a client of its own; `client` holds the client's arguments."""

    def call(*args: Any, client: dict[str, Any] | None = None, **kwargs: Any) -> CaptionResult:
        result: CaptionResult = request.param(*args, client=client or {}, **kwargs)
        return result

    return call


def fail_with(servicer: RecordingServicer, code: grpc.StatusCode, *details: Message) -> None:
    """Let the servicer fail with a rich status."""
    fail_with_metadata(servicer, code, rich_status(code, *details))


def fail_with_metadata(servicer: RecordingServicer, code: grpc.StatusCode, raw: bytes) -> None:
    servicer.answer = lambda request, context: abort(context, code, raw)


WHOLE = CaptionResult(
    captions=(
        Caption(
            text="a red apple",
            score=-0.5,
            token_ids=(5, 6, 2),
            token_logprobs=(-0.25, -0.25, -0.5),
            finish_reason=FinishReason.EOS,
            token_texts=("a red", " apple", ""),
            confidence=0.75,
            degenerate=False,
            attention=Attention(1, 2, (0.5, 0.25, 0.0, 1.0, 0.125, 0.125)),
            words=(Word("red", 0, 1, 0.875, 2.0), Word("apple", 1, 1, 0.5, 4.0)),
            token_groundings=(2.0, 4.0, 0.0),
            grounding=2.0,
            needs_review=True,
            review_reasons=(ReviewReason.LOW_CONFIDENCE,),
        ),
        Caption(
            text="an apple",
            score=-0.75,
            token_ids=(7,),
            token_logprobs=(-0.75,),
            finish_reason=FinishReason.DEADLINE,
            token_texts=("an apple",),
            confidence=0.5,
            degenerate=True,
            attention=None,
            words=(Word("apple", 0, 1, 0.25, None),),
        ),
    ),
    model_version=3,
    cached=True,
)


def test_a_result_is_read_whole(server: Server, caption: Call) -> None:
    result = caption(server[0], IMAGE)
    assert result == WHOLE
    assert result.text == "a red apple"


def test_an_answer_that_was_not_there_is_not_cached(server: Server, caption: Call) -> None:
    target, servicer = server
    response = good_response()
    response.cached = False
    servicer.answer = lambda request, context: response
    assert not caption(target, IMAGE).cached


def test_attention_is_read_token_by_token(server: Server, caption: Call) -> None:
    attention = caption(server[0], IMAGE).captions[0].attention
    assert attention is not None
    assert [attention.grid(token) for token in range(3)] == [
        [[0.5, 0.25]],
        [[0.0, 1.0]],
        [[0.125, 0.125]],
    ]
    for token in (-1, 3):
        with pytest.raises(IndexError):
            attention.grid(token)


def test_the_cache_is_bypassed_when_asked(server: Server, caption: Call) -> None:
    target, servicer = server
    caption(target, IMAGE)
    caption(target, IMAGE, bypass_cache=True)
    assert [request.bypass_cache for request in servicer.requests] == [False, True]


def test_a_client_asks_for_its_version_and_its_turn(server: Server, caption: Call) -> None:
    target, servicer = server
    caption(target, IMAGE)
    caption(target, IMAGE, client={"model_version": 3, "priority": "bulk"})
    caption(target, IMAGE, client={"priority": "interactive"})
    asked = [(request.model_version, request.priority) for request in servicer.requests]
    assert asked == [
        (0, caption_pb2.PRIORITY_UNSPECIFIED),
        (3, caption_pb2.PRIORITY_BULK),
        (0, caption_pb2.PRIORITY_INTERACTIVE),
    ]


@pytest.mark.parametrize(
    "wrong", [{"model_version": 0}, {"model_version": 2**63}, {"priority": "soon"}]
)
def test_a_version_or_turn_that_there_is_not_is_refused(
    server: Server, caption: Call, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        caption(server[0], IMAGE, client=wrong)


def test_the_present_trace_goes_along(server: Server, caption: Call) -> None:
    target, servicer = server
    with TracerProvider().get_tracer("test").start_as_current_span("asking") as span:
        caption(target, IMAGE)
    caption(target, IMAGE)
    inside, outside = (metadata.get("traceparent") for metadata in servicer.metadata)
    assert f"{span.get_span_context().trace_id:032x}" in str(inside)
    assert outside is None


def test_an_unknown_finish_reason_is_no_error(server: Server, caption: Call) -> None:
    target, servicer = server
    response = good_response()
    response.captions[0].finish_reason = 99  # type: ignore[assignment]  # Of a newer server.
    servicer.answer = lambda request, context: response
    assert caption(target, IMAGE).captions[0].finish_reason is FinishReason.UNKNOWN


def test_without_options_none_are_sent(server: Server, caption: Call) -> None:
    target, servicer = server
    caption(target, IMAGE)
    expected = caption_pb2.CaptionRequest(image=caption_pb2.Image(encoded=IMAGE))
    assert servicer.requests == [expected]


def test_exactly_the_options_that_are_set_are_sent(server: Server, caption: Call) -> None:
    target, servicer = server
    caption(target, IMAGE, GenerationOptions(num_beams=4, length_penalty=0.0))
    sent = servicer.requests[0].options
    assert sent == caption_pb2.GenerationOptions(num_beams=4, length_penalty=0.0)
    assert sent.HasField("length_penalty")


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (None, caption_pb2.EARLY_STOPPING_UNSPECIFIED),
        (False, caption_pb2.EARLY_STOPPING_FALSE),
        (True, caption_pb2.EARLY_STOPPING_TRUE),
        ("never", caption_pb2.EARLY_STOPPING_NEVER),
    ],
)
def test_early_stopping_is_sent_as_its_enum(
    server: Server, caption: Call, value: Any, sent: int
) -> None:
    target, servicer = server
    caption(target, IMAGE, GenerationOptions(early_stopping=value))
    assert servicer.requests[0].options.early_stopping == sent


@pytest.mark.parametrize(
    ("options", "faults"),
    [
        ({"num_beams": 2**40}, {"num_beams": "must be an integer of at most 32 bits"}),
        ({"max_length": 10**500}, {"max_length": "must be an integer of at most 32 bits"}),
        ({"num_beams": "four"}, {"num_beams": "must be an integer, is text"}),
        ({"num_beams": True}, {"num_beams": "must be an integer, is a boolean"}),
        ({"num_beams": 4.0}, {"num_beams": "must be an integer, is a number"}),
        ({"do_sample": 1}, {"do_sample": "must be true or false, is an integer"}),
        ({"temperature": True}, {"temperature": "must be a number, is a boolean"}),
        ({"seed": 2**63}, {"seed": "must be an integer of at most 64 bits"}),
        ({"prefix": "\ud800"}, {"prefix": "must be valid Unicode"}),
        ({"bad_words": "red"}, {"bad_words": "must be a list, is text"}),
        ({"force_words": b"red"}, {"force_words": "must be a list, is bytes"}),
        ({"suppress_tokens": 7}, {"suppress_tokens": "must be a list, is an integer"}),
        ({"suppress_tokens": ["a"]}, {"suppress_tokens": "each must be an integer, is text"}),
        (
            {"early_stopping": "always" * 1000, "top_k": []},
            {
                "early_stopping": 'must be true or false or "never", '
                "is 'alwaysalwaysalwaysalwaysalwaysalwaysa...'",
                "top_k": "must be an integer, is a list",
            },
        ),
        ({"early_stopping": []}, {"early_stopping": 'must be true or false or "never", is a list'}),
    ],
    ids=range(15),  # An integer of hundreds of digits is no name for a test.
)
def test_options_that_cannot_be_sent_are_refused_as_the_service_refuses_them(
    server: Server, caption: Call, options: Any, faults: dict[str, str]
) -> None:
    target, servicer = server
    with pytest.raises(CaptionError) as caught:
        caption(target, IMAGE, GenerationOptions(**options))
    assert servicer.requests == []
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.reason == "INVALID_OPTIONS"
    assert caught.value.field_violations == {
        f"options.{name}": text for name, text in faults.items()
    }


BOX = (1, 2, 30, 40)


def test_what_is_asked_of_an_image_is_sent(server: Server, caption: Call) -> None:
    target, servicer = server
    arrays: Any = np.array([BOX, (0, 0, 1, 1)])
    for framing in (
        {"regions": [BOX, [0, 0, 1, 1]], "tiles": (2, 3), "resize": "letterbox"},
        {"regions": arrays, "tiles": np.array([2, 3]), "resize": "letterbox"},
    ):
        caption(target, IMAGE, **framing)
        request = servicer.requests[-1]
        assert [(r.left, r.top, r.right, r.bottom) for r in request.regions] == [BOX, (0, 0, 1, 1)]
        assert (request.tiles.rows, request.tiles.cols) == (2, 3)
        assert request.resize == caption_pb2.RESIZE_LETTERBOX


def test_where_nothing_is_asked_of_an_image_nothing_is_sent(server: Server, caption: Call) -> None:
    target, servicer = server
    caption(target, IMAGE, regions=None, tiles=None, resize=None)
    caption(target, IMAGE, regions=[])
    bare = caption_pb2.CaptionRequest(image=caption_pb2.Image(encoded=IMAGE))
    assert servicer.requests == [bare, bare]


def test_every_way_of_resizing_can_be_asked_for(server: Server, caption: Call) -> None:
    target, servicer = server
    for name in get_args(Resize):
        caption(target, IMAGE, resize=name)
    sent = [caption_pb2.Resize.Name(request.resize) for request in servicer.requests]
    assert sent == [f"RESIZE_{name.upper()}" for name in get_args(Resize)]
    assert {*sent, "RESIZE_UNSPECIFIED"} == set(caption_pb2.Resize.keys())


@pytest.mark.parametrize(
    ("framing", "fields"),
    [
        ({"regions": [BOX, (0, 0, 1)]}, {"regions[1]"}),
        ({"regions": [(0.0, 0, 1, 1), (0, 0, 1, 2**31), BOX]}, {"regions[0]", "regions[1]"}),
        ({"regions": [(0, False, 1, 1)]}, {"regions[0]"}),
        ({"regions": BOX}, {f"regions[{number}]" for number in range(4)}),
        ({"tiles": "2x3"}, {"tiles"}),
        ({"tiles": 2, "resize": "squash"}, {"tiles", "resize"}),
    ],
)
def test_what_cannot_be_asked_of_an_image_is_refused_by_field(
    server: Server, caption: Call, framing: dict[str, Any], fields: set[str]
) -> None:
    target, servicer = server
    with pytest.raises(CaptionError) as caught:
        caption(target, IMAGE, **framing)
    assert servicer.requests == []
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.reason == "INVALID_FRAMING"
    assert set(caught.value.field_violations) == fields


def test_what_an_images_parts_show_is_read(server: Server, caption: Call) -> None:
    target, servicer = server
    response = good_response()
    box = caption_pb2.Region(left=1, top=2, right=30, bottom=40)
    response.regions.add(region=box, captions=response.captions)
    response.regions.add(region=box)
    servicer.answer = lambda request, context: response
    result = caption(target, IMAGE, regions=[BOX, BOX])
    assert result.captions == WHOLE.captions
    described, empty = result.regions
    assert (described.box, described.captions) == (BOX, WHOLE.captions)
    assert described.text == "a red apple"
    assert (empty.captions, empty.text) == ((), "")


def test_every_call_has_a_deadline(server: Server, caption: Call) -> None:
    target, servicer = server
    caption(target, IMAGE)
    caption(target, IMAGE, client={"timeout": 200.0})
    caption(target, IMAGE, client={"timeout": 200.0}, timeout=1000.0)
    for seconds_left, allowed in zip(
        servicer.seconds_left, (DEFAULT_TIMEOUT_SECONDS, 200.0, 1000.0), strict=True
    ):
        assert seconds_left is not None
        # gRPC rounds what it sends up, long times more coarsely.
        assert 0 < seconds_left <= 1.05 * allowed + 1


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_timeouts_that_are_none_are_refused(server: Server, caption: Call, seconds: float) -> None:
    for arguments in ({"timeout": seconds}, {"client": {"timeout": seconds}}):
        with pytest.raises(ValueError, match="timeout must be a positive number of seconds"):
            caption(server[0], IMAGE, **arguments)


def test_a_large_photo_passes(server: Server, caption: Call) -> None:
    target, servicer = server
    caption(target, bytes(20_000_000))
    assert len(servicer.requests[0].image.encoded) == 20_000_000


def test_errors_carry_reason_message_and_fields(server: Server, caption: Call) -> None:
    target, servicer = server
    violation = error_details_pb2.BadRequest.FieldViolation(
        field="options.num_beams", description="must be 1 to 16, is 99"
    )
    fail_with(
        servicer,
        grpc.StatusCode.INVALID_ARGUMENT,
        error_details_pb2.ErrorInfo(reason="INVALID_OPTIONS", domain="captionserve"),
        error_details_pb2.BadRequest(field_violations=[violation]),
    )
    with pytest.raises(CaptionError, match="INVALID_OPTIONS: a sentence") as raised:
        caption(target, IMAGE)
    error = raised.value
    assert (error.code, error.reason, error.message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_OPTIONS",
        "a sentence",
    )
    assert error.field_violations == {"options.num_beams": "must be 1 to 16, is 99"}


@pytest.mark.parametrize(
    "code", [code for code in grpc.StatusCode if code.name not in ("OK", "UNIMPLEMENTED")]
)
def test_without_details_the_code_is_the_reason(
    server: Server, caption: Call, code: grpc.StatusCode
) -> None:
    target, servicer = server
    fail_with(servicer, code)
    with pytest.raises(CaptionError) as raised:
        caption(target, IMAGE, timeout=0.5)
    assert (raised.value.code, raised.value.reason) == (code, code.name)
    assert raised.value.field_violations == {}


def test_anothers_reason_is_not_taken_for_ours(server: Server, caption: Call) -> None:
    target, servicer = server
    foreign = error_details_pb2.ErrorInfo(reason="QUOTA", domain="proxy.example")
    fail_with(servicer, grpc.StatusCode.PERMISSION_DENIED, foreign)
    with pytest.raises(CaptionError) as raised:
        caption(target, IMAGE)
    assert raised.value.reason == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    "raw", [b"\xff\xff", status_pb2.Status(code=3, message="other").SerializeToString()]
)
def test_details_that_cannot_be_read_are_ignored(server: Server, caption: Call, raw: bytes) -> None:
    target, servicer = server
    fail_with_metadata(servicer, grpc.StatusCode.INTERNAL, raw)
    with pytest.raises(CaptionError, match="INTERNAL: a sentence"):
        caption(target, IMAGE)


def test_what_fits_into_no_message_is_refused_before_it_is_sent(
    server: Server, caption: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, servicer = server
    monkeypatch.setattr(_transport, "_MAX_REQUEST_BYTES", 100_000)
    assert caption(target, bytes(99_000)).text == "a red apple"
    # Noise cannot be compressed.
    noise = np.random.default_rng(1).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    with pytest.raises(CaptionError, match="give it as a JPEG file") as refused:
        caption(target, noise)
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.reason == "IMAGE_TOO_LARGE"
    assert len(servicer.requests) == 1


def test_a_deadline_ends_the_call_on_both_sides(server: Server, caption: Call) -> None:
    target, servicer = server
    servicer.answer = servicer.wait_until_gone
    with pytest.raises(CaptionError) as raised:
        caption(target, IMAGE, timeout=0.5)
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert raised.value.reason == "DEADLINE_EXCEEDED"
    assert servicer.ended.wait(WAIT_SECONDS)


def test_cancelling_the_task_cancels_the_call(server: Server) -> None:
    target, servicer = server
    loop_has_call = asyncio.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def announce_and_wait(
            request: caption_pb2.CaptionRequest, context: grpc.ServicerContext
        ) -> caption_pb2.CaptionResponse:
            loop.call_soon_threadsafe(loop_has_call.set)
            return servicer.wait_until_gone(request, context)

        servicer.answer = announce_and_wait
        async with AsyncCaptionClient(target) as client:
            task = asyncio.create_task(client.caption(IMAGE))
            await asyncio.wait_for(loop_has_call.wait(), WAIT_SECONDS)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(servicer.ended.wait, WAIT_SECONDS)

    asyncio.run(run())


def test_the_async_client_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match=re.escape("no running event loop")):
        AsyncCaptionClient("127.0.0.1:9000")


def test_an_unencrypted_server_is_no_answer_for_a_client_with_credentials(
    server: Server, caption: Call
) -> None:
    credentials = grpc.ssl_channel_credentials()
    with pytest.raises(CaptionError) as raised:
        caption(server[0], IMAGE, client={"credentials": credentials, "timeout": 1.0})
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
