"""StreamCaption: parts and end, failures, and callers that leave."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core import tensors
from google.rpc import error_details_pb2

from tests.unit.gateway.fake_triton import WAIT_SECONDS, FakeTriton, part_outputs
from tests.unit.gateway.harness import Setup, detail_of, gateway_setup, request_of
from tests.unit.gateway.test_captions import raw_inputs
from tests.unit.gateway.test_lifecycle import metrics_of


def stream_request(**options: Any) -> caption_pb2.StreamCaptionRequest:
    return caption_pb2.StreamCaptionRequest(request=request_of(**options))


async def responses_of(
    setup: Setup, timeout: float = 10.0
) -> tuple[list[caption_pb2.StreamCaptionResponse], grpc.aio.AioRpcError | None]:
    """What comes, and the error at the end if there is one."""
    found: list[caption_pb2.StreamCaptionResponse] = []
    try:
        call = setup.stub.StreamCaption(stream_request(), timeout=timeout)
        while (response := await call.read()) is not grpc.aio.EOF:
            found.append(response)
    except grpc.aio.AioRpcError as error:
        return found, error
    return found, None


def test_parts_come_in_their_order_and_the_response_last() -> None:
    async def run() -> tuple[list[caption_pb2.StreamCaptionResponse], FakeTriton]:
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
    assert asked.model_name == tensors.CAPTIONER_STREAM.name
    assert asked.parameters["timeout"].int64_param > 0


def test_streams_need_no_nonce() -> None:
    async def run() -> set[str]:
        async with gateway_setup() as setup:
            request = stream_request(do_sample=True, allow_partial=True)
            async for _ in setup.stub.StreamCaption(request, timeout=10):
                pass
            return set(raw_inputs(setup.triton.requests[0]))

    assert asyncio.run(run()) == {"IMAGE", "DO_SAMPLE", "ALLOW_PARTIAL"}


@pytest.mark.parametrize(
    ("message", "code", "reason"),
    [
        (
            json.dumps({"reason": "IMAGE_CORRUPT", "message": "it is cut off"}),
            grpc.StatusCode.INVALID_ARGUMENT,
            "IMAGE_CORRUPT",
        ),
        ("onnx runtime error at /models", grpc.StatusCode.INTERNAL, "MODEL_FAULT"),
        ("Stub process 'x' is not healthy.", grpc.StatusCode.UNAVAILABLE, "MODEL_UNAVAILABLE"),
        (
            "Request for unknown model: 'captioner_stream' is not found",
            grpc.StatusCode.UNAVAILABLE,
            "MODEL_UNAVAILABLE",
        ),
    ],
)
def test_an_error_in_mid_stream_is_told_after_the_words_before_it(
    message: str, code: grpc.StatusCode, reason: str
) -> None:
    async def run() -> tuple[int, grpc.aio.AioRpcError | None]:
        async with gateway_setup() as setup:
            setup.triton.stream_error(message)
            found, error = await responses_of(setup)
            return len(found), error

    parts, error = asyncio.run(run())
    assert parts == 1
    assert error is not None
    assert error.code() is code
    assert detail_of(error, error_details_pb2.ErrorInfo()).reason == reason
    assert "/models" not in (error.details() or "")


@pytest.mark.parametrize("outputs", [[], [part_outputs("a", 1)], [{}]])
def test_a_stream_without_captions_is_a_model_fault(outputs: list[Any]) -> None:
    async def run() -> grpc.aio.AioRpcError | None:
        async with gateway_setup() as setup:
            setup.triton.stream_parts(*outputs)
            return (await responses_of(setup))[1]

    error = asyncio.run(run())
    assert error is not None
    assert detail_of(error, error_details_pb2.ErrorInfo()).reason == "MODEL_FAULT"


def test_a_caller_that_leaves_ends_the_stream_at_triton_and_is_counted() -> None:
    async def run() -> dict[str, float]:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            call = setup.stub.StreamCaption(stream_request(), timeout=60)
            assert (await call.read()).part.text == "a red"
            call.cancel()
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            await setup.gateway._service.wait_idle()
            return await asyncio.to_thread(metrics_of, setup)

    samples = asyncio.run(run())
    assert samples["captionserve_requests_in_flight"] == 0
    assert samples['captionserve_requests_total{code="CANCELLED"}'] == 1


def test_the_deadline_ends_a_stream() -> None:
    async def run() -> grpc.aio.AioRpcError | None:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            _, error = await responses_of(setup, timeout=0.5)
            await asyncio.wait_for(setup.triton.cancelled.wait(), WAIT_SECONDS)
            return error

    error = asyncio.run(run())
    assert error is not None
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_streams_and_calls_share_the_room() -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup(max_concurrent_calls=1) as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            call = setup.stub.StreamCaption(stream_request(), timeout=60)
            await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await setup.stub.Caption(request_of(), timeout=10)
            setup.triton.may_answer.set()
            assert (await call.read()).response.captions
            return refused.value.code()

    assert asyncio.run(run()) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_stopping_lets_a_stream_finish() -> None:
    async def run() -> str:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            call = setup.stub.StreamCaption(stream_request(), timeout=60)
            await call.read()
            stopping = asyncio.create_task(setup.gateway.stop())
            # Let the gateway begin to stop before the model may answer.
            await asyncio.sleep(0)
            setup.triton.may_answer.set()
            last = await call.read()
            await asyncio.wait_for(stopping, WAIT_SECONDS)
            return str(last.response.captions[0].text)

    assert asyncio.run(run()) == "a red apple"


def test_bytes_that_are_no_message_are_invalid() -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup() as setup:
            call: Any = setup.channel.unary_stream("/captionserve.v1.CaptionService/StreamCaption")
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in call(b"\xff\xff", timeout=10):
                    pass
            return raised.value.code()

    assert asyncio.run(run()) is grpc.StatusCode.INVALID_ARGUMENT
