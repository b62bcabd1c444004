"""The public CaptionService: admits a call, asks Triton, answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc
from captionserve.v1 import caption_pb2, caption_pb2_grpc

from captionserve_server.core.errors import (
    DeadlineExceededError,
    ModelFaultError,
    OverloadedError,
)
from captionserve_server.gateway.conversion import (
    caption_part,
    caption_response,
    captioner_inputs,
    nonce,
    nonce_if_needed,
)
from captionserve_server.gateway.triton_client import CaptionerAnswer, TimeLimit, TritonClient

Context = grpc.aio.ServicerContext[Any, Any]

# Of the time left, what a partial caption needs to come to the end of a decoding step and back.
_PARTIAL_MARGIN = 0.1
_LEAST_MARGIN_SECONDS = 0.05
_MOST_MARGIN_SECONDS = 0.5
_LEAST_MODEL_SECONDS = 0.001

SERVICE_NAME = caption_pb2.DESCRIPTOR.services_by_name["CaptionService"].full_name


class CaptionService(caption_pb2_grpc.CaptionServiceServicer):
    """Answers caption calls from Triton; errors are raised, for the interceptor to map."""

    def __init__(
        self, triton: TritonClient, *, max_concurrent_calls: int, deadline_cap_seconds: float
    ) -> None:
        """Serve from `triton`.

        Args:
            triton: whom to ask.
            max_concurrent_calls: one call more is refused as OVERLOADED.
            deadline_cap_seconds: longest time a caption may take, whatever the caller's deadline.
        """
        self._triton = triton
        self._max_concurrent_calls = max_concurrent_calls
        self._deadline_cap_seconds = deadline_cap_seconds
        self._working = 0
        self._unfinished = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no call is in flight, the sending of its answer included."""
        await self._idle.wait()

    async def Caption(  # noqa: N802 - the name is the API's.
        self,
        request: caption_pb2.CaptionRequest,
        context: Context,
    ) -> caption_pb2.CaptionResponse:
        """Describe one image."""
        self._begin(context)
        with self._admitted():
            inputs = captioner_inputs(request) | nonce_if_needed(request)
            answer = await self._triton.infer_captions(inputs, self._time_limit(request, context))
            if not answer.outputs:
                # Triton's response cache keeps failures too, as answers without outputs.
                limit = self._time_limit(request, context)
                answer = await self._triton.infer_captions(inputs | nonce(), limit)
            return _response(answer)

    async def StreamCaption(  # noqa: N802 - the name is the API's.
        self,
        request: caption_pb2.StreamCaptionRequest,
        context: Context,
    ) -> AsyncIterator[caption_pb2.StreamCaptionResponse]:
        """Describe one image, word by word."""
        self._begin(context)
        with self._admitted():
            inputs = captioner_inputs(request.request)
            time_limit = self._time_limit(request.request, context)
            async with aclosing(self._triton.stream_captions(inputs, time_limit)) as answers:
                async for answer in answers:
                    yield _stream_response(answer)

    def _begin(self, context: Context) -> None:
        self._unfinished += 1
        self._idle.clear()
        # Any: the stubs' type of a callback is a class that no method is of.
        end: Any = self._end
        context.add_done_callback(end)

    def _end(self, context: object) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self._idle.set()

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._working >= self._max_concurrent_calls:
            raise OverloadedError("too many requests are in progress")
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1

    def _time_limit(self, request: caption_pb2.CaptionRequest, context: Context) -> TimeLimit:
        # Triton takes a limit of 0 for none.
        seconds = max(self._seconds_left(context), _LEAST_MODEL_SECONDS)
        if not request.options.allow_partial:
            return TimeLimit(call_seconds=seconds, model_seconds=seconds)
        margin = min(max(_PARTIAL_MARGIN * seconds, _LEAST_MARGIN_SECONDS), _MOST_MARGIN_SECONDS)
        return TimeLimit(seconds, max(seconds - margin, _LEAST_MODEL_SECONDS))

    def _seconds_left(self, context: Context) -> float:
        remaining: float | None = context.time_remaining()
        if remaining is None:
            return self._deadline_cap_seconds
        if remaining <= 0:
            raise DeadlineExceededError("the deadline passed before the caption was begun")
        return min(remaining, self._deadline_cap_seconds)


def _response(answer: CaptionerAnswer) -> caption_pb2.CaptionResponse:
    try:
        return caption_response(
            answer.outputs, model_version=answer.model_version, request_id=answer.request_id
        )
    except (ValueError, LookupError) as error:
        raise ModelFaultError("the model gave an answer that cannot be read") from error


def _stream_response(answer: CaptionerAnswer) -> caption_pb2.StreamCaptionResponse:
    if answer.is_final:
        return caption_pb2.StreamCaptionResponse(response=_response(answer))
    try:
        return caption_pb2.StreamCaptionResponse(part=caption_part(answer.outputs))
    except LookupError as error:
        raise ModelFaultError("the model gave an answer that cannot be read") from error
