"""Asking Triton's `captioner` model, and telling its failures apart."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
    OverloadedError,
    from_wire,
)
from captionserve_server.gateway.conversion import Inputs
from captionserve_server.gateway.kserve import infer_request, read_outputs
from captionserve_server.triton import wire
from captionserve_server.triton.wire import ModelSpec, TensorSpec

_log = logging.getLogger(__name__)

_CHANNEL_OPTIONS = [
    # The gateway's own limit has already bounded the request.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A restarted Triton is found again at once; gRPC's own limit is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Whether to try again is the caller's decision.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]

# How Triton words a full queue and a request that waited too long; a stream's errors have no code.
_OVERLOAD_TEXTS = ("Exceeds maximum queue size", "Request timeout expired")
# How Triton words, on a stream without status codes, a model that is being loaded.
_UNKNOWN_MODEL_TEXT = "Request for unknown model"
# How Triton words a model whose Python process has died.
_DEAD_STUB_TEXT = "is not healthy"

_UNAVAILABLE = "the model server cannot answer now"
_FAULT = "the model server failed"


@dataclass(frozen=True)
class TimeLimit:
    """How long a request may take.

    Attributes:
        call_seconds: until the connection gives up.
        model_seconds: until the model must answer with what it has.
    """

    call_seconds: float
    model_seconds: float


@dataclass(frozen=True)
class CaptionerAnswer:
    """One response of a captioner model.

    Attributes:
        outputs: those that there are.
        request_id: which request it answers.
        model_version: which version answered.
    """

    outputs: dict[TensorSpec, NDArray[Any]]
    request_id: str
    model_version: int

    @property
    def is_final(self) -> bool:
        """Whether it has the captions."""
        return wire.TEXT in self.outputs


class TritonClient:
    """A connection to one Triton."""

    def __init__(self, address: str) -> None:
        """Prepare a channel to host:port; it connects with the first call."""
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def infer_captions(self, inputs: Inputs, time_limit: TimeLimit) -> CaptionerAnswer:
        """Caption one image; cancelling the task cancels the work in Triton.

        Args:
            inputs: the captioner's inputs.
            time_limit: how long it may take.

        Raises:
            CaptionServeError: whatever went wrong.
        """
        request = _request(wire.CAPTIONER, inputs, time_limit)
        try:
            response = await self._stub.ModelInfer(request, timeout=time_limit.call_seconds)
        except grpc.aio.AioRpcError as error:
            raise error_of_triton(error.code(), error.details() or "") from error
        return _answer(wire.CAPTIONER, response)

    async def stream_captions(
        self, inputs: Inputs, time_limit: TimeLimit
    ) -> AsyncGenerator[CaptionerAnswer, None]:
        """Caption one image and yield what becomes known of it, at last the captions.

        Closing the generator cancels the work in Triton. Arguments and errors are those of
        `infer_captions`.
        """
        request = _request(wire.CAPTIONER_STREAM, inputs, time_limit)
        call = self._stub.ModelStreamInfer(_once(request), timeout=time_limit.call_seconds)
        try:
            async for response in call:
                if response.error_message:
                    raise error_of_triton(grpc.StatusCode.INTERNAL, response.error_message)
                answer = _answer(wire.CAPTIONER_STREAM, response.infer_response)
                yield answer
                if answer.is_final:
                    return
        except grpc.aio.AioRpcError as error:
            raise error_of_triton(error.code(), error.details() or "") from error
        finally:
            call.cancel()
        raise ModelFaultError("the model ended without an answer")

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()


def _request(
    model: ModelSpec, inputs: Inputs, time_limit: TimeLimit
) -> service_pb2.ModelInferRequest:
    return infer_request(
        model,
        inputs,
        request_id=uuid.uuid4().hex,
        timeout_microseconds=int(time_limit.model_seconds * 1e6),
    )


def _answer(model: ModelSpec, response: service_pb2.ModelInferResponse) -> CaptionerAnswer:
    try:
        outputs = read_outputs(response, model.outputs)
        return CaptionerAnswer(outputs, response.id, int(response.model_version))
    except ValueError as error:
        raise ModelFaultError("the model gave an answer that cannot be read") from error


async def _once(
    request: service_pb2.ModelInferRequest,
) -> AsyncIterator[service_pb2.ModelInferRequest]:
    yield request


def error_of_triton(code: grpc.StatusCode, details: str) -> CaptionServeError:
    """What a failed call to Triton means to the caller.

    Args:
        code: the call's status code.
        details: Triton's text, which may be one of our own errors as JSON.
    """
    own = from_wire(details)
    if own is not None:
        return own
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError("the deadline passed before the caption was complete")
    if code is grpc.StatusCode.CANCELLED:
        return CancelledError("the request was cancelled")
    # The caller gets a sentence; the text is for who runs the server.
    _log.warning("Triton failed: %s: %s", code.name, details)
    if any(text in details for text in _OVERLOAD_TEXTS):
        return OverloadedError("too many requests are waiting")
    # NOT_FOUND: between the unloading and loading of a model that is being revived.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND):
        return ModelUnavailableError(_UNAVAILABLE)
    if _DEAD_STUB_TEXT in details or _UNKNOWN_MODEL_TEXT in details:
        return ModelUnavailableError(_UNAVAILABLE)
    return ModelFaultError(_FAULT)
