"""What the client makes of descriptions, and of streams that break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from captionserve_server.core.errors import (
    CaptionServeError,
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.core.options import DecodingOptions
from captionserve_server.gateway import decoder_client
from captionserve_server.gateway.decoder_client import Answer, DecoderClient, Description, TimeLimit
from captionserve_server.gateway.kserve import InputTensor, encode_strings
from captionserve_server.triton import wire
from tritonclient.grpc import service_pb2

from tests.unit.gateway.fake_triton import WAIT_SECONDS, Context, fake_triton

IMAGE = [InputTensor(wire.IMAGE, (1,), encode_strings([b"an image"]))]
VERSION = 3
LIMIT = TimeLimit(call_seconds=60.0, model_seconds=60.0)


def describe(**attributes: Any) -> Description:
    """What is described by a fake Triton with these attributes."""

    async def run() -> Description:
        async with fake_triton() as triton:
            for name, value in attributes.items():
                setattr(triton, name, value)
            client = DecoderClient(triton.address)
            try:
                return await client.describe(VERSION)
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
    described = describe(version=7, defaults=options.as_given())
    assert described == Description(7, options, 32, "int8", (224, 224))


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
            first = asyncio.create_task(client.caption(IMAGE, VERSION, LIMIT))
            await asyncio.wait_for(triton.arrived.wait(), WAIT_SECONDS)
            with pytest.raises(ModelUnavailableError):
                await client.caption(IMAGE, VERSION, LIMIT)
            triton.may_answer.set()
            answer = await first
            await client.close()
            return text_of(answer)

    assert asyncio.run(run()) == "a red apple"


def test_a_cancelled_task_cancels_its_stream() -> None:
    async def run() -> None:
        async with fake_triton() as triton:
            triton.stream = triton.stream_when_allowed
            client = DecoderClient(triton.address)
            task = asyncio.create_task(client.caption(IMAGE, VERSION, LIMIT))
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
                await client.caption(IMAGE, VERSION, TimeLimit(0.2, 0.2))
            await asyncio.wait_for(triton.cancelled.wait(), WAIT_SECONDS)
            await client.close()
            return raised.value

    assert asyncio.run(run()).reason == "DEADLINE_EXCEEDED"


def text_of(answer: Answer) -> str:
    return str(answer.outputs[wire.TEXT.name].values[0])


def test_calls_one_after_another_share_a_stream() -> None:
    # What the fake Triton sends behind a last answer belongs to the call that has had it.
    async def run() -> tuple[list[str], int]:
        async with fake_triton() as triton:
            client = DecoderClient(triton.address)
            texts = [text_of(await client.caption(IMAGE, VERSION, LIMIT)) for _ in range(5)]
            await client.close()
            return texts, triton.opened

    assert asyncio.run(run()) == (["a red apple"] * 5, 1)


def test_calls_at_once_share_none_and_leave_theirs_to_the_next() -> None:
    async def run() -> int:
        async with fake_triton() as triton:
            client = DecoderClient(triton.address)
            for _ in range(2):
                await asyncio.gather(*(client.caption(IMAGE, VERSION, LIMIT) for _ in range(8)))
            await client.close()
            return triton.opened

    assert asyncio.run(run()) == 8


def test_idle_streams_are_ended_and_not_cancelled() -> None:
    async def run() -> int:
        async with fake_triton() as triton:
            client = DecoderClient(triton.address)
            await asyncio.gather(*(client.caption(IMAGE, VERSION, LIMIT) for _ in range(3)))
            await client.close()
            return triton.ended

    assert asyncio.run(run()) == 3


def test_a_triton_that_does_not_end_a_stream_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def run() -> None:
        async with fake_triton() as triton:
            triton.stream = triton.stream_and_stay
            client = DecoderClient(triton.address)
            await client.caption(IMAGE, VERSION, LIMIT)
            await asyncio.wait_for(client.close(), WAIT_SECONDS)
            await asyncio.wait_for(triton.cancelled.wait(), WAIT_SECONDS)

    monkeypatch.setattr(decoder_client, "_END_SECONDS", 0.1)
    asyncio.run(run())


def test_an_error_within_a_stream_costs_only_its_call() -> None:
    async def run() -> tuple[str, int]:
        async with fake_triton() as triton:
            client = DecoderClient(triton.address)
            triton.stream_error("a bug")
            with pytest.raises(ModelFaultError):
                await client.caption(IMAGE, VERSION, LIMIT)
            triton.stream = triton.stream_well
            text = text_of(await client.caption(IMAGE, VERSION, LIMIT))
            await client.close()
            return text, triton.opened

    assert asyncio.run(run()) == ("a red apple", 1)


@pytest.mark.parametrize("seconds", [0.2, 60.0])
def test_a_stream_whose_call_was_given_up_is_not_used_again(seconds: float) -> None:
    # Its answer is still to come: by the caller's deadline, or because the task was cancelled.
    async def run() -> tuple[str, int]:
        async with fake_triton() as triton:
            client = DecoderClient(triton.address)
            triton.stream = triton.stream_when_allowed
            given_up = asyncio.create_task(
                client.caption(IMAGE, VERSION, TimeLimit(seconds, seconds))
            )
            await asyncio.wait_for(triton.arrived.wait(), WAIT_SECONDS)
            if seconds > WAIT_SECONDS:
                given_up.cancel()
            with pytest.raises((DeadlineExceededError, asyncio.CancelledError)):
                await given_up
            triton.stream = triton.stream_well
            text = text_of(await client.caption(IMAGE, VERSION, LIMIT))
            await client.close()
            return text, triton.opened

    assert asyncio.run(run()) == ("a red apple", 2)


def test_after_a_restart_of_triton_kept_streams_are_not_used() -> None:
    async def run() -> str:
        async with fake_triton() as triton:
            client = DecoderClient(triton.address)
            await client.caption(IMAGE, VERSION, LIMIT)
        async with fake_triton(triton.address) as triton:
            for _ in range(2):
                # The first may come before the connection is known to have broken.
                try:
                    return text_of(await client.caption(IMAGE, VERSION, LIMIT))
                except ModelUnavailableError:
                    continue
            raise AssertionError("unavailable twice")

    assert asyncio.run(run()) == "a red apple"


def test_a_model_that_ends_without_an_answer_is_at_fault_at_once() -> None:
    async def run() -> None:
        async with fake_triton() as triton:
            triton.stream_parts()
            client = DecoderClient(triton.address)
            with pytest.raises(ModelFaultError, match="without an answer"):
                await client.caption(IMAGE, VERSION, LIMIT)
            await client.close()

    asyncio.run(run())
