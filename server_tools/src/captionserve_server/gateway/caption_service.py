"""The public CaptionService: admits a call, asks Triton, answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from captionserve.v1 import caption_pb2, caption_pb2_grpc

from captionserve_server.core.errors import (
    DeadlineExceededError,
    ModelFaultError,
    OverloadedError,
)
from captionserve_server.gateway.conversion import caption_response, captioner_inputs
from captionserve_server.gateway.triton_client import TritonClient

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
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> caption_pb2.CaptionResponse:
        """Describe one image."""
        self._begin(context)
        with self._admitted():
            inputs = captioner_inputs(request)
            outputs, version = await self._triton.infer_captions(
                inputs, self._seconds_left(context)
            )
            try:
                return caption_response(outputs, version)
            except (ValueError, KeyError) as error:
                raise ModelFaultError("the model gave an answer that cannot be read") from error

    def _begin(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
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

    def _seconds_left(self, context: grpc.aio.ServicerContext[Any, Any]) -> float:
        remaining: float | None = context.time_remaining()
        if remaining is None:
            return self._deadline_cap_seconds
        if remaining <= 0:
            raise DeadlineExceededError("the deadline passed before the caption was begun")
        return min(remaining, self._deadline_cap_seconds)
