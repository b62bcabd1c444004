"""Asking Triton's `captioner` model, and telling its failures apart."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import grpc
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2_grpc

from captionserve_server.core import tensors
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
    OverloadedError,
    from_wire,
)
from captionserve_server.core.tensors import TensorSpec
from captionserve_server.gateway.kserve import Element, infer_request, read_outputs

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

# How Triton words a full queue and a request that waited too long, both UNAVAILABLE.
_OVERLOAD_TEXTS = ("Exceeds maximum queue size", "Request timeout expired")
# How Triton words a model whose Python process has died.
_DEAD_STUB_TEXT = "is not healthy"

_UNAVAILABLE = "the model server cannot answer now"
_FAULT = "the model server failed"


class TritonClient:
    """A connection to one Triton."""

    def __init__(self, address: str) -> None:
        """Prepare a channel to host:port; it connects with the first call."""
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def infer_captions(
        self, inputs: Mapping[TensorSpec, Element], timeout_seconds: float
    ) -> tuple[dict[TensorSpec, NDArray[Any]], int]:
        """Caption one image; cancelling the task cancels the work in Triton.

        Args:
            inputs: the captioner's inputs, one element each.
            timeout_seconds: how long it may take.

        Returns:
            the captioner's outputs and the version of the model.

        Raises:
            CaptionServeError: whatever went wrong.
        """
        request = infer_request(tensors.CAPTIONER, inputs, int(timeout_seconds * 1e6))
        try:
            response = await self._stub.ModelInfer(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise error_of_triton(error.code(), error.details() or "") from error
        try:
            outputs = read_outputs(response, tensors.CAPTIONER.outputs)
            return outputs, int(response.model_version)
        except ValueError as error:
            raise ModelFaultError("the model gave an answer that cannot be read") from error

    async def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        await self._channel.close()


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
    if code is grpc.StatusCode.UNAVAILABLE and any(text in details for text in _OVERLOAD_TEXTS):
        return OverloadedError("too many requests are waiting")
    # NOT_FOUND: between the unloading and loading of a model that is being revived.
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND):
        return ModelUnavailableError(_UNAVAILABLE)
    if _DEAD_STUB_TEXT in details:
        return ModelUnavailableError(_UNAVAILABLE)
    return ModelFaultError(_FAULT)
