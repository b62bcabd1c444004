"""Each way of failing has its status, and no failure shows more than its sentence."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core import errors
from captionserve_server.gateway import conversion
from captionserve_server.gateway.kserve import encode_strings
from captionserve_server.gateway.status import CODES, DOMAIN, rpc_status
from captionserve_server.triton import wire
from google.rpc import error_details_pb2, status_pb2

from tests.unit.gateway.fake_triton import (
    WAIT_SECONDS,
    FakeTriton,
    good_outputs,
    infer_response,
    with_region,
)
from tests.unit.gateway.harness import detail_of, gateway_setup, request_of

# What must never reach a caller.
SECRET = "/srv/models/captioner/1/model.py: ValueError"

Failure = grpc.aio.AioRpcError


def every_error() -> list[errors.CaptionServeError]:
    """One of each type of the tree."""
    return [
        error_type({"num_beams": "must be 1 to 16, is 99"})
        if issubclass(error_type, (errors.InvalidFramingError, errors.InvalidOptionsError))
        else error_type("a sentence")
        for error_type in errors.all_error_types()
    ]


async def failure_of(
    stub: Any, request: caption_pb2.CaptionRequest, timeout: float = 10
) -> Failure:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Caption(request, timeout=timeout)
    return raised.value


def failing(prepare: Any, request: caption_pb2.CaptionRequest | None = None) -> Failure:
    """The failure of one call after `prepare` has set the fake Triton up."""

    async def run() -> Failure:
        async with gateway_setup() as setup:
            prepare(setup.triton)
            return await failure_of(setup.stub, request or request_of())

    return asyncio.run(run())


def reason_of(error: Failure) -> str:
    info = detail_of(error, error_details_pb2.ErrorInfo())
    assert info.domain == DOMAIN
    reason: str = info.reason
    return reason


def violations_of(error: Failure) -> dict[str, str]:
    bad_request = detail_of(error, error_details_pb2.BadRequest())
    return {item.field: item.description for item in bad_request.field_violations}


def test_every_error_is_in_the_status_table() -> None:
    assert set(CODES) == set(errors.all_error_types())


def test_every_reason_is_used_once() -> None:
    reasons = [error_type.reason for error_type in errors.all_error_types()]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("error", every_error(), ids=lambda error: error.reason)
def test_the_decoders_own_errors_pass_through(error: errors.CaptionServeError) -> None:
    failure = failing(lambda triton: triton.stream_error(wire.error_text(error)))
    assert failure.code() is CODES[type(error)]
    assert failure.details() == error.message
    assert reason_of(failure) == error.reason


def test_option_violations_name_the_field() -> None:
    error = errors.InvalidOptionsError({"num_beams": "is bad", "max_length": "is worse"})
    failure = failing(lambda triton: triton.stream_error(wire.error_text(error)))
    assert violations_of(failure) == {
        "options.num_beams": "is bad",
        "options.max_length": "is worse",
    }


def test_a_bad_image_names_the_image() -> None:
    text = wire.error_text(errors.ImageCorruptError("the image is empty"))
    failure = failing(lambda triton: triton.stream_error(text))
    assert violations_of(failure) == {"image": "the image is empty"}


@pytest.mark.parametrize(
    "request_without_image",
    [
        caption_pb2.CaptionRequest(),
        caption_pb2.CaptionRequest(image=caption_pb2.Image()),
    ],
)
def test_a_request_without_image_is_refused(
    request_without_image: caption_pb2.CaptionRequest,
) -> None:
    failure = failing(lambda triton: None, request_without_image)
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(failure) == "IMAGE_MISSING"
    assert set(violations_of(failure)) == {"image"}


def test_an_unnamed_early_stopping_is_refused() -> None:
    failure = failing(lambda triton: None, request_of(early_stopping=17))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations_of(failure) == {"options.early_stopping": 'must be true or false or "never"'}


@pytest.mark.parametrize(
    ("code", "details", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size", "OVERLOADED"),
        (grpc.StatusCode.UNAVAILABLE, "Request timeout expired", "OVERLOADED"),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", "MODEL_UNAVAILABLE"),
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model", "MODEL_UNAVAILABLE"),
        (
            grpc.StatusCode.INTERNAL,
            "Stub process 'captioner_0_0' is not healthy.",
            "MODEL_UNAVAILABLE",
        ),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.CANCELLED, "cancelled", "CANCELLED"),
        (grpc.StatusCode.INTERNAL, "onnx runtime error", "MODEL_FAULT"),
        (grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape for input", "MODEL_FAULT"),
        (grpc.StatusCode.UNKNOWN, '{"reason": "NO_SUCH", "message": "x"}', "MODEL_FAULT"),
    ],
)
def test_tritons_own_failures_are_told_apart(
    code: grpc.StatusCode, details: str, reason: str
) -> None:
    failure = failing(lambda triton: triton.fail(code, f"{details} {SECRET}"))
    assert reason_of(failure) == reason
    assert_keeps_secret(failure)


def test_overload_says_when_to_come_back() -> None:
    failure = failing(
        lambda triton: triton.fail(grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")
    )
    assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail_of(failure, error_details_pb2.RetryInfo()).retry_delay.seconds == 1
    assert dict(failure.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"


def test_a_model_that_is_away_says_when_to_come_back() -> None:
    failure = failing(lambda triton: triton.fail(grpc.StatusCode.UNAVAILABLE, "Socket closed"))
    delay = detail_of(failure, error_details_pb2.RetryInfo()).retry_delay
    assert delay.ToMilliseconds() == 500


def test_no_triton_is_model_unavailable() -> None:
    async def run() -> Failure:
        async with gateway_setup() as setup:
            await setup.disconnect()
            return await failure_of(setup.stub, request_of())

    failure = asyncio.run(run())
    assert failure.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(failure) == "MODEL_UNAVAILABLE"
    assert "127.0.0.1" not in (failure.details() or "")


def without(spec: wire.TensorSpec) -> dict[Any, Any]:
    return {key: value for key, value in good_outputs().items() if key is not spec}


@pytest.mark.parametrize(
    "outputs",
    [
        *(without(spec) for spec in wire.ANSWER if spec not in (wire.TEXT, *wire.WHERE_ASKED_FOR)),
        good_outputs() | {wire.TOKEN_LOGPROBS: np.zeros((2, 1), "<f4")},
        good_outputs() | {wire.TOKEN_TEXTS: np.full((2, 2), b"", np.object_)},
        good_outputs() | {wire.DEGENERATE: np.zeros(1, "?")},
        good_outputs() | {wire.CONFIDENCE: np.zeros(2, "<f4")},
        good_outputs() | {wire.ATTENTIONS: np.zeros((2, 1, 1, 2), "<f4")},
        good_outputs() | {wire.ATTENTIONS: np.zeros((1, 3, 1, 2), "<f4")},
        good_outputs() | {wire.ATTENTIONS: np.zeros((2, 3, 2), "<f4")},
        good_outputs() | {wire.WORD_CONFIDENCES: np.zeros((2, 1), "<f8")},
        good_outputs() | {wire.WORD_CONFIDENCES: np.zeros((1, 3), "<f8")},
        good_outputs() | {wire.TOKEN_GROUNDINGS: np.zeros((2, 2), "<f4")},
        good_outputs() | {wire.REVIEW_REASONS: encode_strings([b"", b"a bad day"])},
        good_outputs() | {wire.REVIEW_REASONS: encode_strings([b""])},
        {key: value for key, value in with_region().items() if key is not wire.REGION_CAPTIONS},
        with_region() | {wire.REGION_CAPTIONS: np.array([2], "<i4")},
        with_region() | {wire.REGION_CAPTIONS: np.array([3], "<i4")},
        with_region() | {wire.REGION_CAPTIONS: np.array([1, 0], "<i4")},
        with_region() | {wire.REGION_BOXES: np.zeros((1, 3), "<i4")},
        good_outputs() | {wire.TEXT: b"\x05\x00\x00\x00cut"},
        good_outputs() | {wire.TEXT: b"\x05\x00"},
        good_outputs() | {wire.TEXT: encode_strings([b"\xff", b"no UTF-8"])},
        good_outputs() | {wire.TEXT: encode_strings([b"only one"])},
        good_outputs() | {wire.FINISH_REASON: encode_strings([b"eos", SECRET.encode()])},
        good_outputs() | {wire.SCORE: np.zeros(3, "<f8")},
        good_outputs() | {wire.SCORE: np.zeros((2, 1), "<f8")},
    ],
)
def test_an_answer_that_makes_no_sense_is_a_model_fault(outputs: dict[Any, Any]) -> None:
    failure = failing(lambda triton: triton.answer_with(infer_response(outputs)))
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert reason_of(failure) == "MODEL_FAULT"
    assert failure.details() == "the model gave an answer that cannot be read"
    assert_keeps_secret(failure)


def test_a_version_that_is_no_number_is_a_model_fault() -> None:
    response = infer_response(good_outputs(), version="latest")
    assert reason_of(failing(lambda triton: triton.answer_with(response))) == "MODEL_FAULT"


def test_no_captions_is_a_model_fault() -> None:
    outputs: dict[wire.TensorSpec, Any] = {
        spec: np.zeros((0,) * len(spec.dims), "<f8" if spec is wire.SCORE else "<i4")
        for spec in wire.ANSWER
    }
    failure = failing(lambda triton: triton.answer_with(infer_response(outputs)))
    assert reason_of(failure) == "MODEL_FAULT"


def assert_keeps_secret(failure: Failure) -> None:
    assert SECRET not in (failure.details() or "")
    for _, value in failure.trailing_metadata():
        raw = value if isinstance(value, bytes) else value.encode()
        assert SECRET.encode() not in raw


def test_an_unexpected_exception_shows_nothing_of_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(request: caption_pb2.CaptionRequest) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr(conversion, "decoder_message", explode)
    failure = failing(lambda triton: None)
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert reason_of(failure) == "INTERNAL"
    assert_keeps_secret(failure)
    assert SECRET in caplog.text, "whoever runs the server must find the exception in the log"


def test_the_deadline_passes_in_triton() -> None:
    async def run() -> Failure:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            failure = await failure_of(setup.stub, request_of(), timeout=0.5)
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            return failure

    assert asyncio.run(run()).code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_the_cap_holds_without_a_deadline() -> None:
    async def run() -> Failure:
        async with gateway_setup(deadline_cap_seconds=0.2) as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await setup.stub.Caption(request_of())
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            return raised.value

    failure = asyncio.run(run())
    assert failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert reason_of(failure) == "DEADLINE_EXCEEDED"


def test_cancelling_the_call_reaches_triton() -> None:
    async def run() -> None:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            call = setup.stub.Caption(request_of(), timeout=60)
            await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
            call.cancel()
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)

    asyncio.run(run())


def test_one_call_too_many_is_overload_and_room_comes_back() -> None:
    async def run() -> Failure:
        async with gateway_setup(max_concurrent_calls=1) as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            first = setup.stub.Caption(request_of(), timeout=60)
            await asyncio.wait_for(setup.triton.arrived.wait(), WAIT_SECONDS)
            failure = await failure_of(setup.stub, request_of())
            setup.triton.may_answer.set()
            await first
            await setup.stub.Caption(request_of(b"another"), timeout=60)
            return failure

    failure = asyncio.run(run())
    assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_of(failure) == "OVERLOADED"


@pytest.mark.parametrize("error", every_error(), ids=lambda error: error.reason)
def test_the_rich_status_repeats_the_plain_one(error: errors.CaptionServeError) -> None:
    status = rpc_status(error)
    rich = status_pb2.Status.FromString(dict(status.trailing_metadata)["grpc-status-details-bin"])
    assert (rich.code, rich.message) == (status.code.value[0], status.message)


def test_the_fake_fails_only_when_told() -> None:
    """A control: the failures above come from what the tests set up."""

    async def run() -> str:
        async with gateway_setup() as setup:
            assert isinstance(setup.triton, FakeTriton)
            answer: caption_pb2.CaptionResponse = await setup.stub.Caption(request_of(), timeout=10)
            return answer.captions[0].text

    assert asyncio.run(run()) == "a red apple"


def test_bytes_that_are_no_message_are_invalid_and_show_nothing() -> None:
    async def run() -> Failure:
        async with gateway_setup() as setup:
            # Without serialisers the bytes go out as they are.
            caption: Any = setup.channel.unary_unary("/captionserve.v1.CaptionService/Caption")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await caption(b"\xff\xff\xff", timeout=10)
            return raised.value

    error = asyncio.run(run())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "the request is not a valid message"
    assert reason_of(error) == "INVALID_REQUEST"
