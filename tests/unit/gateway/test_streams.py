"""StreamCaption: parts and end, failures, callers that leave, and a gateway that stops."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import grpc
import numpy as np
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core import errors
from captionserve_server.gateway import caption_service, conversion
from captionserve_server.gateway.kserve import encode_strings
from captionserve_server.gateway.status import CODES
from captionserve_server.triton import wire
from google.rpc import error_details_pb2
from tritonclient.grpc import service_pb2

from tests.unit.gateway.fake_triton import (
    WAIT_SECONDS,
    FakeTriton,
    good_outputs,
    part_outputs,
    with_attention,
)
from tests.unit.gateway.harness import Setup, detail_of, gateway_setup, request_of
from tests.unit.gateway.test_failures import (
    SECRET,
    Failure,
    assert_keeps_secret,
    every_error,
    reason_of,
    violations_of,
    without,
)
from tests.unit.gateway.test_lifecycle import begin_to_stop, in_flight, metrics_of, requests

Responses = list[caption_pb2.StreamCaptionResponse]
STREAM_CAPTION = "/captionserve.v1.CaptionService/StreamCaption"


def stream_request(**options: Any) -> caption_pb2.StreamCaptionRequest:
    return caption_pb2.StreamCaptionRequest(request=request_of(**options))


async def responses_of(
    setup: Setup, request: caption_pb2.StreamCaptionRequest | None = None
) -> tuple[Responses, Failure | None]:
    """What comes, and the error at the end if there is one."""
    found: Responses = []
    try:
        async for response in setup.stub.StreamCaption(request or stream_request(), timeout=10):
            found.append(response)
    except grpc.aio.AioRpcError as error:
        return found, error
    return found, None


def failing_stream(
    prepare: Callable[[FakeTriton], None],
    request: caption_pb2.StreamCaptionRequest | None = None,
) -> tuple[Responses, Failure]:
    """What one stream gives, and how it fails, after `prepare` has set the fake Triton up."""

    async def run() -> tuple[Responses, Failure | None]:
        async with gateway_setup() as setup:
            prepare(setup.triton)
            return await responses_of(setup, request)

    found, error = asyncio.run(run())
    assert error is not None
    return found, error


async def metrics_when_idle(setup: Setup) -> dict[str, float]:
    """The metrics once no call is in flight."""
    await setup.gateway._calls.wait_idle()
    return await asyncio.to_thread(metrics_of, setup)


def test_parts_come_in_their_order_and_the_response_last() -> None:
    async def run() -> tuple[Responses, FakeTriton]:
        async with gateway_setup() as setup:
            found, error = await responses_of(setup)
            assert error is None
            return found, setup.triton

    (*parts, last), triton = asyncio.run(run())
    assert [(part.part.text, list(part.part.token_ids)) for part in parts] == [
        ("a red", [5]),
        (" apple", [6, 2]),
    ]
    assert last.response.captions[0].text == "a red apple"
    (asked,) = triton.requests
    assert [tensor.name for tensor in asked.inputs] == ["IMAGE", "STREAM"]
    assert asked.model_name == wire.DECODER.name


def test_a_part_may_have_no_text_and_text_may_be_of_any_script() -> None:
    async def run() -> Responses:
        async with gateway_setup() as setup:
            # Two tokens may share one character.
            setup.triton.stream_parts(
                part_outputs("", 7), part_outputs("\u732b", 8), good_outputs()
            )
            return (await responses_of(setup))[0]

    *parts, _ = asyncio.run(run())
    assert [(part.part.text, list(part.part.token_ids)) for part in parts] == [
        ("", [7]),
        ("\u732b", [8]),
    ]


STEP = {
    "parents": [0, 0],
    "token_ids": [5, 7],
    "token_texts": ["a red", " \u732b"],
    "token_logprobs": [-0.5, -1.5],
    "scores": [-0.5, -1.5],
    "fates": ["kept", "dropped"],
    "beams": [0, -1],
}


def steps_outputs(text: str) -> dict[Any, Any]:
    """A part without words, but with this as its steps."""
    return part_outputs("") | {wire.NEW_BEAM_STEPS: encode_strings([text.encode()])}


def test_a_part_may_have_steps_of_the_search_and_nothing_else() -> None:
    async def run() -> Responses:
        async with gateway_setup() as setup:
            written = json.dumps([STEP, {**STEP, "fates": ["finished", "dropped"]}])
            setup.triton.stream_parts(
                steps_outputs(written), part_outputs("a red apple", 5, 6, 2), good_outputs()
            )
            return (await responses_of(setup))[0]

    first, second, _ = asyncio.run(run())
    assert (first.part.text, list(first.part.token_ids)) == ("", [])
    fates = [caption_pb2.BEAM_FATE_KEPT, caption_pb2.BEAM_FATE_DROPPED]
    one, other = first.part.beam_steps
    assert one == caption_pb2.BeamStep(**{**STEP, "fates": fates})  # type: ignore[arg-type]
    assert other.fates[0] == caption_pb2.BEAM_FATE_FINISHED
    assert not second.part.beam_steps


def test_the_end_is_what_caption_would_have_returned() -> None:
    async def run() -> tuple[Responses, caption_pb2.CaptionResponse]:
        async with gateway_setup() as setup:
            setup.triton.stream_parts(part_outputs("a red", 5), with_attention())
            found, _ = await responses_of(setup)
            return found, await setup.stub.Caption(request_of(), timeout=10)

    found, whole = asyncio.run(run())
    assert found[-1] == caption_pb2.StreamCaptionResponse(response=whole)
    assert whole.captions[0].HasField("attention")


def test_streams_are_neither_remembered_nor_shared() -> None:
    async def run() -> tuple[list[bool], int]:
        async with gateway_setup() as setup:
            await setup.stub.Caption(request_of(), timeout=10)
            found = [(await responses_of(setup))[0][-1].response.cached for _ in range(2)]
            return found, len(setup.triton.requests)

    assert asyncio.run(run()) == ([False, False], 3)


def test_invalid_options_are_refused_before_the_model_is_asked() -> None:
    async def run() -> tuple[Failure | None, int]:
        async with gateway_setup() as setup:
            _, failure = await responses_of(setup, stream_request(num_beams=99))
            return failure, len(setup.triton.requests)

    failure, asked = asyncio.run(run())
    assert failure is not None
    assert set(violations_of(failure)) == {"options.num_beams"}
    assert asked == 0


@pytest.mark.parametrize("error", every_error(), ids=lambda error: error.reason)
def test_the_decoders_own_errors_come_after_the_words_before_them(
    error: errors.CaptionServeError,
) -> None:
    (part,), failure = failing_stream(lambda triton: triton.stream_error(wire.error_text(error)))
    assert part.part.text == "a red"
    assert failure.code() is CODES[type(error)]
    assert failure.details() == error.message
    assert reason_of(failure) == error.reason


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        ("onnx runtime error at", grpc.StatusCode.INTERNAL, "MODEL_FAULT"),
        ('{"reason": "NO_SUCH", "message": "x"}', grpc.StatusCode.INTERNAL, "MODEL_FAULT"),
        (
            "[request id: 7] Exceeds maximum queue size",
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OVERLOADED",
        ),
        ("Stub process 'x' is not healthy.", grpc.StatusCode.UNAVAILABLE, "MODEL_UNAVAILABLE"),
        (
            "Request for unknown model: 'decoder' is not found",
            grpc.StatusCode.UNAVAILABLE,
            "MODEL_UNAVAILABLE",
        ),
        (
            "Request for unknown model: 'decoder' has no available versions",
            grpc.StatusCode.UNAVAILABLE,
            "MODEL_UNAVAILABLE",
        ),
    ],
)
def test_tritons_own_errors_in_mid_stream_are_told_apart(
    message: str, code: grpc.StatusCode, reason: str
) -> None:
    parts, failure = failing_stream(lambda triton: triton.stream_error(f"{message} {SECRET}"))
    assert len(parts) == 1
    assert failure.code() is code
    assert reason_of(failure) == reason
    assert_keeps_secret(failure)


@pytest.mark.parametrize(
    ("code", "details", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size", "OVERLOADED"),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", "MODEL_UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.CANCELLED, "cancelled", "CANCELLED"),
        (grpc.StatusCode.INTERNAL, "onnx runtime error", "MODEL_FAULT"),
    ],
)
def test_a_stream_that_breaks_off_is_told_by_its_status(
    code: grpc.StatusCode, details: str, reason: str
) -> None:
    parts, failure = failing_stream(lambda triton: triton.fail_stream(code, f"{details} {SECRET}"))
    assert len(parts) == 1
    assert reason_of(failure) == reason
    assert_keeps_secret(failure)


def test_no_triton_is_model_unavailable() -> None:
    async def run() -> tuple[Responses, Failure | None]:
        async with gateway_setup() as setup:
            await setup.disconnect()
            return await responses_of(setup)

    found, failure = asyncio.run(run())
    assert found == []
    assert failure is not None
    assert reason_of(failure) == "MODEL_UNAVAILABLE"
    assert "127.0.0.1" not in (failure.details() or "")


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {wire.NEW_TEXT: encode_strings([b"a"])},
        {wire.NEW_TOKEN_IDS: np.zeros(1, "<i4")},
        part_outputs("a", 5) | {wire.NEW_TEXT: b""},
        part_outputs("a", 5) | {wire.NEW_TEXT: b"\x05\x00\x00\x00cut"},
        part_outputs("a", 5) | {wire.NEW_TOKEN_IDS: np.zeros((1, 1), "<i4")},
        part_outputs("a", 5) | {wire.NEW_TOKEN_IDS: np.zeros(1, "<i8")},
        steps_outputs("cut: ["),
        steps_outputs(json.dumps([{**STEP, "fates": ["lost", "dropped"]}])),
        steps_outputs(json.dumps([{**STEP, "places": [0, 1]}])),
        *(without(spec) for spec in wire.ANSWER if spec not in wire.WHERE_ASKED_FOR),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_model_fault(outputs: dict[Any, Any]) -> None:
    parts, failure = failing_stream(
        lambda triton: triton.stream_parts(part_outputs("a red", 5), outputs)
    )
    assert [part.part.text for part in parts] == ["a red"]
    assert reason_of(failure) == "MODEL_FAULT"
    assert failure.details() == "the model gave an answer that cannot be read"


@pytest.mark.parametrize("outputs", [[], [part_outputs("a", 1)]])
def test_a_stream_without_captions_is_a_model_fault(outputs: list[Any]) -> None:
    parts, failure = failing_stream(lambda triton: triton.stream_parts(*outputs))
    assert len(parts) == len(outputs)
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert reason_of(failure) == "MODEL_FAULT"
    assert failure.details() == "the model ended without an answer"


@pytest.mark.parametrize(
    "request_without_image",
    [caption_pb2.StreamCaptionRequest(), stream_request(num_beams=2)],
)
def test_a_request_without_image_is_refused(
    request_without_image: caption_pb2.StreamCaptionRequest,
) -> None:
    request_without_image.request.ClearField("image")
    _, failure = failing_stream(lambda triton: None, request_without_image)
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(failure) == "IMAGE_MISSING"
    assert set(violations_of(failure)) == {"image"}


def test_an_unnamed_early_stopping_is_refused() -> None:
    _, failure = failing_stream(lambda triton: None, stream_request(early_stopping=17))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert set(violations_of(failure)) == {"options.early_stopping"}


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (conversion, "decoder_message"),
        (caption_service, "caption_part"),
        (caption_service, "turn_stage"),
    ],
)
def test_an_unexpected_exception_shows_nothing_of_itself(
    module: ModuleType,
    function: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(module, function, explode)
    _, failure = failing_stream(lambda triton: None)
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert reason_of(failure) == "INTERNAL"
    assert_keeps_secret(failure)
    assert SECRET in caplog.text, "whoever runs the server must find the exception in the log"


def test_bytes_that_are_no_message_are_invalid_and_counted() -> None:
    async def run() -> tuple[Failure, list[service_pb2.ModelInferRequest], dict[str, float]]:
        async with gateway_setup() as setup:
            # Without serialisers the bytes go out as they are.
            call: Any = setup.channel.unary_stream(STREAM_CAPTION)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await call(b"\xff\xff", timeout=10).read()
            samples = await asyncio.to_thread(metrics_of, setup)
            return raised.value, setup.triton.requests, samples

    failure, asked, samples = asyncio.run(run())
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.details() == "the request is not a valid message"
    assert reason_of(failure) == "INVALID_REQUEST"
    assert asked == []
    assert samples[requests("StreamCaption", "INVALID_ARGUMENT")] == 1


def test_streams_are_counted_by_code() -> None:
    async def run() -> tuple[dict[str, float], dict[str, float]]:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            call = setup.stub.StreamCaption(stream_request(), timeout=60)
            await call.read()
            during = await asyncio.to_thread(metrics_of, setup)
            setup.triton.may_answer.set()
            assert (await call.read()).response.captions
            setup.triton.stream_error("onnx runtime error")
            await responses_of(setup)
            return during, await metrics_when_idle(setup)

    during, after = asyncio.run(run())
    assert during[in_flight("StreamCaption")] == 1
    assert after[in_flight("StreamCaption")] == 0
    assert after['captionserve_request_seconds_count{method="StreamCaption"}'] == 2
    assert after[requests("StreamCaption", "OK")] == 1
    assert after[requests("StreamCaption", "INTERNAL")] == 1


def test_the_end_does_not_wait_for_tritons_end() -> None:
    async def run() -> tuple[Responses, Failure | None]:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_and_stay
            return await responses_of(setup)

    (last,), failure = asyncio.run(run())
    assert last.response.captions
    assert failure is None


# A handler may be waiting for Triton or for the caller to read on when the call ends.
@pytest.mark.parametrize("stream", ["stream_when_allowed", "stream_on_and_on"])
def test_a_caller_that_leaves_ends_the_stream_at_triton_and_is_counted(stream: str) -> None:
    async def run() -> dict[str, float]:
        async with gateway_setup(max_concurrent_calls=1) as setup:
            setup.triton.stream = getattr(setup.triton, stream)
            call = setup.stub.StreamCaption(stream_request(), timeout=60)
            assert (await call.read()).part.text.startswith("a")
            call.cancel()
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            samples = await metrics_when_idle(setup)
            # There is room again.
            setup.triton.stream = setup.triton.stream_well
            await setup.stub.Caption(request_of(), timeout=10)
            return samples

    samples = asyncio.run(run())
    assert samples[in_flight("StreamCaption")] == 0
    assert samples[requests("StreamCaption", "CANCELLED")] == 1


@pytest.mark.parametrize("stream", ["stream_when_allowed", "stream_on_and_on"])
def test_the_callers_deadline_ends_a_stream_and_is_counted(stream: str) -> None:
    async def run() -> tuple[grpc.StatusCode, dict[str, float]]:
        async with gateway_setup() as setup:
            setup.triton.stream = getattr(setup.triton, stream)
            # gRPC tells the server 1.01 s, so the caller's clock is the first to run out.
            call = setup.stub.StreamCaption(stream_request(), timeout=1.002)
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            return await call.code(), await metrics_when_idle(setup)

    code, samples = asyncio.run(run())
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert samples[in_flight("StreamCaption")] == 0
    assert samples[requests("StreamCaption", "DEADLINE_EXCEEDED")] == 1


def test_the_cap_holds_without_a_deadline() -> None:
    async def run() -> Failure:
        async with gateway_setup(deadline_cap_seconds=0.5) as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in setup.stub.StreamCaption(stream_request()):
                    pass
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            return raised.value

    failure = asyncio.run(run())
    assert failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert reason_of(failure) == "DEADLINE_EXCEEDED"


async def begin_call(setup: Setup, method: str) -> Any:
    """A call of the service that goes on until Triton may answer."""
    setup.triton.stream = setup.triton.stream_when_allowed
    request = stream_request() if method == "StreamCaption" else request_of()
    call = getattr(setup.stub, method)(request, timeout=60)
    await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
    return call


async def ended(call: Any) -> None:
    """Wait for a call's end; raises the error that it ends with."""
    if isinstance(call, grpc.aio.UnaryUnaryCall):
        await call
        return
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("StreamCaption", "StreamCaption"),
        ("StreamCaption", "Caption"),
        ("Caption", "StreamCaption"),
    ],
)
def test_streams_and_calls_share_the_room(first: str, second: str) -> None:
    async def run() -> Failure:
        async with gateway_setup(max_concurrent_calls=1) as setup:
            call = await begin_call(setup, first)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ended(await begin_call(setup, second))
            setup.triton.may_answer.set()
            await ended(call)
            # There is room again.
            await ended(await begin_call(setup, second))
            assert len(setup.triton.requests) == 2
            return refused.value

    failure = asyncio.run(run())
    assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_of(failure) == "OVERLOADED"
    assert detail_of(failure, error_details_pb2.RetryInfo()).retry_delay.seconds == 1


def test_stopping_lets_a_stream_finish() -> None:
    async def run() -> caption_pb2.StreamCaptionResponse:
        async with gateway_setup() as setup:
            call = await begin_call(setup, "StreamCaption")
            assert (await call.read()).part.text == "a red"
            stopping, _watch = await begin_to_stop(setup)
            setup.triton.may_answer.set()
            last: caption_pb2.StreamCaptionResponse = await call.read()
            assert await call.code() is grpc.StatusCode.OK
            # The watcher of the health would stay for ever; it must not hold the end up.
            await asyncio.wait_for(stopping, WAIT_SECONDS)
            return last

    assert asyncio.run(run()).response.captions[0].text == "a red apple"


@pytest.mark.parametrize("stream", ["stream_when_allowed", "stream_on_and_on"])
def test_after_the_grace_period_streams_are_ended(stream: str) -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup(drain_seconds=0.2) as setup:
            setup.triton.stream = getattr(setup.triton, stream)
            call = setup.stub.StreamCaption(stream_request(), timeout=60)
            await call.read()
            await setup.gateway.drain(asyncio.Event())
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            # The status comes behind what has not been read.
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await ended(call)
            return raised.value.code()

    assert asyncio.run(run()) is grpc.StatusCode.UNAVAILABLE
