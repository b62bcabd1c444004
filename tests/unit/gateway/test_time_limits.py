"""How long a call and the model may take, from the caller's deadline and the gateway's cap."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core.errors import DeadlineExceededError
from captionserve_server.core.options import DecodingOptions
from captionserve_server.gateway.cache import AnswerCache
from captionserve_server.gateway.caption_service import CaptionService
from captionserve_server.gateway.decoder_client import Answer, Description, TimeLimit
from captionserve_server.gateway.kserve import InputTensor, read_outputs
from captionserve_server.gateway.metrics import GatewayMetrics
from captionserve_server.triton import wire

from tests.unit.gateway.fake_triton import good_outputs, infer_response
from tests.unit.gateway.harness import gateway_setup, request_of

CAP_SECONDS = 60.0
MARGINS = [
    # Half a second at most, 50 ms at least, 10 % between.
    (None, 59.5),
    (100.0, 59.5),
    (10.0, 9.5),
    (5.0, 4.5),
    (4.0, 3.6),
    (2.0, 1.8),
    (0.5, 0.45),
    (0.4, 0.35),
    # Triton takes a limit of 0 for none.
    (0.05, 0.001),
    (0.02, 0.001),
    (1e-6, 0.001),
]


class Call:
    """As much of a call's context as the service asks for."""

    def __init__(self, seconds_left: float | None) -> None:
        self._seconds_left = seconds_left

    def time_remaining(self) -> float | None:
        return self._seconds_left

    def add_done_callback(self, callback: object) -> None:
        """Nobody waits for the end."""


class RecordingDecoder:
    """Answers well, and keeps the time limits that it was given."""

    def __init__(self) -> None:
        self.limits: list[TimeLimit] = []

    async def describe(self) -> Description:
        return Description(3, DecodingOptions())

    async def caption(self, inputs: Iterable[InputTensor], time_limit: TimeLimit) -> Answer:
        self.limits.append(time_limit)
        specs = {spec.name: spec for spec in wire.CAPTIONS}
        return Answer(read_outputs(infer_response(good_outputs()), specs), model_version=3)

    async def stream(
        self, inputs: Iterable[InputTensor], time_limit: TimeLimit
    ) -> AsyncIterator[Answer]:
        yield await self.caption(inputs, time_limit)


def limits_of(method: str, seconds_left: float | None, **options: Any) -> list[TimeLimit]:
    """What the decoder is given for a call with so much time left."""
    decoder: Any = RecordingDecoder()
    context: Any = Call(seconds_left)

    async def run() -> None:
        service = CaptionService(
            decoder,
            AnswerCache(0),
            GatewayMetrics(),
            max_concurrent_calls=1,
            deadline_cap_seconds=CAP_SECONDS,
        )
        if method == "Caption":
            await service.Caption(request_of(**options), context)
            return
        request = caption_pb2.StreamCaptionRequest(request=request_of(**options))
        async for _ in service.StreamCaption(request, context):
            pass

    asyncio.run(run())
    limits: list[TimeLimit] = decoder.limits
    return limits


@pytest.mark.parametrize("method", ["Caption", "StreamCaption"])
@pytest.mark.parametrize(
    ("seconds_left", "expected"), [(None, 60.0), (100.0, 60.0), (10.0, 10.0), (1e-6, 0.001)]
)
def test_the_model_has_the_calls_whole_time(
    method: str, seconds_left: float | None, expected: float
) -> None:
    # Sampling without a seed: work that is shared has the cap instead.
    limits = limits_of(method, seconds_left, do_sample=True)
    assert limits == [TimeLimit(call_seconds=expected, model_seconds=expected)]


@pytest.mark.parametrize("seconds_left", [None, 100.0, 10.0, 0.5])
def test_work_that_others_may_join_has_the_time_of_the_cap(seconds_left: float | None) -> None:
    assert limits_of("Caption", seconds_left) == [TimeLimit(CAP_SECONDS, CAP_SECONDS)]


@pytest.mark.parametrize("method", ["Caption", "StreamCaption"])
@pytest.mark.parametrize(("seconds_left", "expected"), MARGINS)
def test_a_partial_caption_is_asked_for_before_the_end(
    method: str, seconds_left: float | None, expected: float
) -> None:
    (limit,) = limits_of(method, seconds_left, allow_partial=True)
    (whole,) = limits_of(method, seconds_left, do_sample=True)
    assert limit.model_seconds == pytest.approx(expected)
    assert limit.call_seconds == whole.call_seconds


@pytest.mark.parametrize("method", ["Caption", "StreamCaption"])
@pytest.mark.parametrize("seconds_left", [0.0, -1.0])
def test_a_call_that_is_too_late_is_not_begun(method: str, seconds_left: float) -> None:
    with pytest.raises(DeadlineExceededError, match="before the caption was begun"):
        limits_of(method, seconds_left)


@pytest.mark.parametrize(
    ("allow_partial", "microseconds"), [(False, 30_000_000), (True, 29_500_000)]
)
def test_triton_is_told_the_models_limit(allow_partial: bool, microseconds: int) -> None:
    async def run() -> list[int]:
        # Without a deadline of the caller's the cap is all there is, to the microsecond.
        async with gateway_setup(deadline_cap_seconds=30.0) as setup:
            request = request_of(allow_partial=allow_partial)
            await setup.stub.Caption(request)
            async for _ in setup.stub.StreamCaption(
                caption_pb2.StreamCaptionRequest(request=request)
            ):
                pass
            return [asked.parameters["timeout"].int64_param for asked in setup.triton.requests]

    assert asyncio.run(run()) == [microseconds, microseconds]
