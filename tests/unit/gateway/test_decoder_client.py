"""What the client makes of descriptions, and of streams that break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from captionserve_server.core.errors import (
    CaptionServeError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.core.options import DecodingOptions
from captionserve_server.gateway.decoder_client import DecoderClient, Description, TimeLimit
from captionserve_server.gateway.kserve import InputTensor, encode_strings
from captionserve_server.triton import wire
from tritonclient.grpc import service_pb2

from tests.unit.gateway.fake_triton import WAIT_SECONDS, Context, fake_triton
from tests.unit.gateway.harness import gateway_setup, request_of

IMAGE = [InputTensor(wire.IMAGE, (1,), encode_strings([b"an image"]))]
LIMIT = TimeLimit(call_seconds=60.0, model_seconds=60.0)


def describe(**attributes: Any) -> Description:
    """What is described by a fake Triton with these attributes."""

    async def run() -> Description:
        async with fake_triton() as triton:
            for name, value in attributes.items():
                setattr(triton, name, value)
            client = DecoderClient(triton.address)
            try:
                return await client.describe()
            finally:
                await client.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "options",
    [
        DecodingOptions(),
        DecodingOptions(num_beams=4, early_stopping="never", bad_words=("a cat",)),
        # Of use to those who sample only; a checkpoint may say it all the same.
        DecodingOptions(temperature=0.5, top_k=3),
    ],
)
def test_a_description_comes_back_whole(options: DecodingOptions) -> None:
    assert describe(version=7, defaults=options.as_given()) == Description(7, options)


@pytest.mark.parametrize(
    "attributes",
    [
        {"version": "latest"},
        {"version": None},
        {"defaults": None},
        {"defaults": [1]},
        {"defaults": {"no_such_option": 1}},
        {"defaults": {"num_beams": 99}},
    ],
)
def test_a_description_that_makes_no_sense_is_a_model_fault(attributes: dict[str, Any]) -> None:
    with pytest.raises(ModelFaultError, match="cannot be read"):
        describe(**attributes)


def test_first_callers_ask_for_the_description_together() -> None:
    async def run() -> int:
        async with gateway_setup() as setup:
            requests = [request_of(bytes([number])) for number in range(8)]
            await asyncio.gather(*(setup.stub.Caption(each, timeout=10) for each in requests))
            return setup.triton.described

    assert asyncio.run(run()) == 1


def test_a_stream_that_breaks_fails_no_other_call() -> None:
    async def run() -> str:
        async with fake_triton() as triton:

            async def stream(
                request: service_pb2.ModelInferRequest, context: Context
            ) -> AsyncIterator[service_pb2.ModelStreamInferResponse]:
                if len(triton.requests) > 1:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                async for response in triton.stream_when_allowed(request, context):
                    yield response

            triton.stream = stream
            client = DecoderClient(triton.address)
            first = asyncio.create_task(client.caption(IMAGE, LIMIT))
            await asyncio.wait_for(triton.arrived.wait(), WAIT_SECONDS)
            with pytest.raises(ModelUnavailableError):
                await client.caption(IMAGE, LIMIT)
            triton.may_answer.set()
            answer = await first
            await client.close()
            return str(answer.outputs[wire.TEXT.name].values[0])

    assert asyncio.run(run()) == "a red apple"


def test_a_cancelled_task_cancels_its_stream() -> None:
    async def run() -> None:
        async with fake_triton() as triton:
            triton.stream = triton.stream_when_allowed
            client = DecoderClient(triton.address)
            task = asyncio.create_task(client.caption(IMAGE, LIMIT))
            await asyncio.wait_for(triton.arrived.wait(), WAIT_SECONDS)
            task.cancel()
            await asyncio.wait_for(triton.cancelled.wait(), WAIT_SECONDS)
            with pytest.raises(asyncio.CancelledError):
                await task
            await client.close()

    asyncio.run(run())


def test_time_that_passes_ends_the_stream() -> None:
    async def run() -> CaptionServeError:
        async with fake_triton() as triton:
            triton.stream = triton.stream_when_allowed
            client = DecoderClient(triton.address)
            with pytest.raises(CaptionServeError) as raised:
                await client.caption(IMAGE, TimeLimit(0.2, 0.2))
            await asyncio.wait_for(triton.cancelled.wait(), WAIT_SECONDS)
            await client.close()
            return raised.value

    assert asyncio.run(run()).reason == "DEADLINE_EXCEEDED"
