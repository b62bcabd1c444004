"""How long a call and the model may take, from the caller's deadline and the gateway's cap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core.errors import DeadlineExceededError
from captionserve_server.core.options import DecodingOptions
from captionserve_server.gateway.cache import AnswerCache
from captionserve_server.gateway.calls import Call
from captionserve_server.gateway.caption_service import CaptionService
from captionserve_server.gateway.conversion import decoder_message
from captionserve_server.gateway.decoder_client import Answer, Description, TimeLimit
from captionserve_server.gateway.identity import ANYBODY
from captionserve_server.gateway.kserve import InputTensor, read_outputs
from captionserve_server.gateway.metrics import GatewayMetrics
from captionserve_server.tracing import Traces
from captionserve_server.triton import wire

from tests.unit.gateway.fake_triton import good_outputs, infer_response
from tests.unit.gateway.harness import gateway_setup, request_of, settings_of

CAP_SECONDS = 60.0
# What may have passed of the time until the model is asked.
PASSED_SECONDS = 0.5
MARGINS = [
    # Half a second at most, 10 % below.
    (60.0, 59.5),
    (10.0, 9.5),
    (5.0, 4.5),
    (4.0, 3.6),
    (2.0, 1.8),
]


class RecordingDecoder:
    """Answers well, and keeps the time limits that it was given."""

    def __init__(self) -> None:
        self.limits: list[TimeLimit] = []

    async def caption(
        self, inputs: Iterable[InputTensor], version: int, time_limit: TimeLimit
    ) -> Answer:
        self.limits.append(time_limit)
        specs = {spec.name: spec for spec in wire.ANSWER}
        return Answer(read_outputs(infer_response(good_outputs()), specs), model_version=version)

    async def stream(
        self, inputs: Iterable[InputTensor], version: int, time_limit: TimeLimit
    ) -> AsyncIterator[Answer]:
        yield await self.caption(inputs, version, time_limit)


def limits_of(method: str, seconds_left: float, **options: Any) -> list[TimeLimit]:
    """What the decoder is given for a call with so much time left."""
    decoder: Any = RecordingDecoder()

    async def run() -> None:
        settings = settings_of(deadline_cap_seconds=CAP_SECONDS)
        service = CaptionService(AnswerCache(0), GatewayMetrics(), Traces(None, ""), settings)
        service.connect(decoder, [Description(3, DecodingOptions(), 32, "fp32", (224, 224))])
        call = Call(ANYBODY, asyncio.get_running_loop().time() + seconds_left)
        message = decoder_message(request_of(**options))
        if method == "Caption":
            await service.caption(message, call)
            return
        async for _ in service.stream_caption(message, call):
            pass

    asyncio.run(run())
    limits: list[TimeLimit] = decoder.limits
    return limits


@pytest.mark.parametrize("method", ["Caption", "StreamCaption"])
@pytest.mark.parametrize("seconds_left", [60.0, 10.0, 1.0])
def test_the_model_has_the_calls_whole_time(method: str, seconds_left: float) -> None:
    # Sampling without a seed: work that is shared has the cap instead.
    (limit,) = limits_of(method, seconds_left, do_sample=True)
    assert limit.call_seconds == limit.model_seconds
    assert 0 <= seconds_left - limit.call_seconds < PASSED_SECONDS


@pytest.mark.parametrize("seconds_left", [60.0, 10.0, 1.0])
def test_work_that_others_may_join_has_the_time_of_the_cap(seconds_left: float) -> None:
    (limit,) = limits_of("Caption", seconds_left)
    assert 0 <= CAP_SECONDS - limit.call_seconds < PASSED_SECONDS


@pytest.mark.parametrize("method", ["Caption", "StreamCaption"])
@pytest.mark.parametrize(("seconds_left", "expected"), MARGINS)
def test_a_partial_caption_is_asked_for_before_the_end(
    method: str, seconds_left: float, expected: float
) -> None:
    # Work that may be shared has the cap for its time.
    (limit,) = limits_of(method, seconds_left, allow_partial=True, do_sample=True)
    assert 0 <= expected - limit.model_seconds < PASSED_SECONDS
    assert 0 <= seconds_left - limit.call_seconds < PASSED_SECONDS


@pytest.mark.parametrize("method", ["Caption", "StreamCaption"])
@pytest.mark.parametrize("seconds_left", [0.0, -1.0])
def test_a_call_that_is_too_late_is_not_begun(method: str, seconds_left: float) -> None:
    with pytest.raises(DeadlineExceededError, match="before the caption was begun"):
        limits_of(method, seconds_left)


@pytest.mark.parametrize(("allow_partial", "seconds"), [(False, 30.0), (True, 29.5)])
def test_triton_is_told_the_models_limit(allow_partial: bool, seconds: float) -> None:
    async def run() -> list[int]:
        # Without a deadline of the caller's the cap is all there is.
        async with gateway_setup(deadline_cap_seconds=30.0) as setup:
            request = request_of(allow_partial=allow_partial)
            await setup.stub.Caption(request)
            async for _ in setup.stub.StreamCaption(
                caption_pb2.StreamCaptionRequest(request=request)
            ):
                pass
            return [asked.parameters["timeout"].int64_param for asked in setup.triton.requests]

    for microseconds in asyncio.run(run()):
        assert 0 <= seconds - microseconds / 1e6 < PASSED_SECONDS


@pytest.mark.parametrize("bypass_cache", [False, True])
def test_who_cannot_be_answered_in_time_is_refused_though_others_may_join(
    bypass_cache: bool,
) -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup() as setup:
            setup.triton.stream = setup.triton.stream_when_allowed
            # A first answer tells how long they take; then as many as there are turns stay.
            first = asyncio.ensure_future(setup.stub.Caption(request_of(b"first"), timeout=20))
            await asyncio.sleep(0.5)
            setup.triton.may_answer.set()
            await first
            setup.triton.may_answer.clear()
            turns = range(32 + 4)
            calls = [setup.stub.Caption(request_of(b"%d" % n), timeout=20) for n in turns]
            while (await setup.stub.GetModels(models, timeout=20)).load.working < len(turns):
                await asyncio.sleep(0.01)
            late = request_of(b"late")
            late.bypass_cache = bypass_cache
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await setup.stub.Caption(late, timeout=0.4)
            setup.triton.may_answer.set()
            await asyncio.gather(*calls)
            return raised.value.code()

    models = caption_pb2.GetModelsRequest()
    assert asyncio.run(run()) is grpc.StatusCode.RESOURCE_EXHAUSTED
