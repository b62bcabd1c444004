"""Asking Triton's `decoder` model, and telling its failures apart."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import grpc
from tritonclient.grpc import service_pb2

from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    DeadlineExceededError,
    InvalidOptionsError,
    ModelFaultError,
    ModelUnavailableError,
    OverloadedError,
)
from captionserve_server.core.options import DecodingOptions
from captionserve_server.gateway.kserve import InputTensor, Outputs, infer_request, read_outputs
from captionserve_server.triton import wire

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

_STREAM_METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
# As many as the decoder has work for at once; a call beyond them opens a stream and closes it.
_KEPT_STREAMS = 64
# Asks Triton to say when a model has ended without an answer, and marks its last response.
_WANT_FINAL = "triton_enable_empty_final_response"
_IS_FINAL = "triton_final_response"

# How Triton words a full queue and a request that waited too long; a stream's errors have no code.
_OVERLOAD_TEXTS = ("Exceeds maximum queue size", "Request timeout expired")
# How Triton words, on a stream without status codes, a model that is being loaded.
_UNKNOWN_MODEL_TEXT = "Request for unknown model"
# How Triton words a model whose Python process has died.
_DEAD_STUB_TEXT = "is not healthy"

_UNAVAILABLE = "the model server cannot answer now"
_FAULT = "the model server failed"
_UNREADABLE = "the model gave an answer that cannot be read"
_NO_ANSWER = "the model ended without an answer"
_TOO_LATE = "the deadline passed before the caption was complete"

# The decoder answers this from memory; only a Triton that hangs takes longer.
_DESCRIBE_SECONDS = 10.0
# A Triton that answers is on this machine, and a connection to it there already.
_CONNECT_SECONDS = 2.0
# Triton ends an idle stream at once.
_END_SECONDS = 2.0

_OUTPUTS = {spec.name: spec for spec in wire.DECODER.outputs}

# Generic in the type stubs only.
_Stream: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"


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
class Description:
    """What a version of the decoder is.

    Attributes:
        version: which one it is.
        defaults: the options of its checkpoint.
        slots: captions that it decodes at once.
        precision: of its weights.
        image_size: (height, width) of the images that it reads.
    """

    version: int
    defaults: DecodingOptions
    slots: int
    precision: str
    image_size: tuple[int, int]


class Answer(NamedTuple):
    """One response of the decoder: the outputs that there are, and which version gave them."""

    outputs: Outputs
    model_version: int

    @property
    def is_final(self) -> bool:
        """Whether it is the last one: it has the captions, or the description."""
        return wire.TEXT.name in self.outputs or wire.DESCRIPTION.name in self.outputs


class DecoderClient:
    """The decoder of one Triton.

    A call has a stream for itself while it lasts, so that cancelling it cancels nothing else and a
    large image holds up no small one. A stream whose call has ended well is kept for the next:
    opening one costs as much as the rest of the way to the decoder (docs/adr/0015).
    """

    def __init__(self, address: str) -> None:
        """Prepare a channel to host:port; it connects with the first call."""
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        # Not the stub's, which would take messages: requests are bytes already.
        self._open_stream: Callable[[], _Stream] = self._channel.stream_stream(
            _STREAM_METHOD,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )
        self._idle: list[_Stream] = []
        self._calls: set[_Call] = set()
        self._no_calls = asyncio.Event()
        self._no_calls.set()
        self._abandoned = False
        # Unique without asking the system for randomness in each call.
        self._id_prefix = uuid.uuid4().hex[:16]
        self._id_numbers = itertools.count()

    async def describe(self, version: int) -> Description:
        """Ask what a version is; CaptionServeError on failure."""
        inputs = [InputTensor(wire.DESCRIBE, (1,), b"\x01")]
        time_limit = TimeLimit(_DESCRIBE_SECONDS, _DESCRIBE_SECONDS)
        try:
            answer = await self.caption(inputs, version, time_limit)
        except DeadlineExceededError as error:
            # Not the caller's deadline: the decoder answers this one at once.
            raise ModelUnavailableError(_UNAVAILABLE) from error
        try:
            description = json.loads(answer.outputs[wire.DESCRIPTION.name].values[0])
            defaults = DecodingOptions.from_given(description["defaults"])
            height, width = description["image_size"]
            return Description(
                version=int(description["version"]),
                defaults=defaults,
                slots=int(description["slots"]),
                precision=str(description["precision"]),
                image_size=(int(height), int(width)),
            )
        except (ValueError, LookupError, TypeError, AttributeError, InvalidOptionsError) as error:
            raise ModelFaultError(_UNREADABLE) from error

    async def caption(
        self, inputs: Iterable[InputTensor], version: int, time_limit: TimeLimit
    ) -> Answer:
        """The final answer to one message; cancelling the task cancels the work in Triton.

        Args:
            inputs: the decoder's inputs.
            version: which of its versions shall answer.
            time_limit: how long it may take.

        Raises:
            CaptionServeError: whatever went wrong.
        """
        async with aclosing(self.stream(inputs, version, time_limit)) as answers:
            async for answer in answers:
                if answer.is_final:
                    return answer
        raise AssertionError("a stream ends with its final answer, or an error")

    async def stream(
        self, inputs: Iterable[InputTensor], version: int, time_limit: TimeLimit
    ) -> AsyncGenerator[Answer, None]:
        """The answers to one message as they come, the final one last.

        Closing the generator cancels the work in Triton. Arguments and errors are those of
        `caption`.
        """
        kept = self._take_idle()
        request_id = f"{self._id_prefix}-{next(self._id_numbers)}"
        call = _Call(kept or self._open_stream(), request_id)
        self._calls.add(call)
        self._no_calls.clear()
        timer = asyncio.get_running_loop().call_later(time_limit.call_seconds, call.expire)
        try:
            if kept is None:
                # Cancelling a stream does not wake who waits for its connection.
                await _connected(call.stream, time_limit.call_seconds)
            parameters = {"timeout": int(time_limit.model_seconds * 1e6), _WANT_FINAL: True}
            await call.send(
                infer_request(
                    wire.DECODER,
                    inputs,
                    version=version,
                    request_id=request_id,
                    parameters=parameters,
                )
            )
            while not call.ended:
                yield await call.next_answer()
        except grpc.aio.AioRpcError as error:
            if self._abandoned:
                raise ModelUnavailableError(_UNAVAILABLE) from error
            raise error_of_triton(error.code(), error.details() or "") from error
        except asyncio.CancelledError as error:
            # Waiting for a cancelled stream ends as in a cancelled task.
            if self._abandoned:
                raise ModelUnavailableError(_UNAVAILABLE) from error
            if call.expired:
                raise DeadlineExceededError(_TOO_LATE) from error
            raise
        finally:
            timer.cancel()
            self._calls.discard(call)
            if not self._calls:
                self._no_calls.set()
            if call.ended and len(self._idle) < _KEPT_STREAMS:
                self._idle.append(call.stream)
            else:
                call.stream.cancel()

    async def wait_idle(self) -> None:
        """Wait until no call is in flight."""
        await self._no_calls.wait()

    def abandon(self) -> None:
        """Fail all calls as ModelUnavailableError, because nobody will answer them any more."""
        self._abandoned = True
        for call in list(self._calls):
            call.stream.cancel()

    async def close(self) -> None:
        """Close the connection; calls in flight fail as ModelUnavailableError.

        Idle streams are ended and not cancelled: Triton may keep a cancelled one's last request,
        and with it the model, which it then cannot unload.
        """
        self.abandon()
        ends = asyncio.gather(*map(_end, self._idle), return_exceptions=True)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(ends, _END_SECONDS)
        await self._channel.close()

    def _take_idle(self) -> _Stream | None:
        """The stream that was used last; those that have broken meanwhile are dropped."""
        while self._idle:
            stream = self._idle.pop()
            if not stream.done():
                return stream
        return None


async def _connected(stream: _Stream, call_seconds: float) -> None:
    try:
        await asyncio.wait_for(stream.wait_for_connection(), min(call_seconds, _CONNECT_SECONDS))
    except asyncio.TimeoutError as error:
        if call_seconds <= _CONNECT_SECONDS:
            raise DeadlineExceededError(_TOO_LATE) from error
        raise ModelUnavailableError(_UNAVAILABLE) from error


async def _end(stream: _Stream) -> None:
    await stream.done_writing()
    while await stream.read() is not grpc.aio.EOF:
        pass


class _Call:
    """One call on a stream that it has for itself while it lasts.

    Attributes:
        stream: which may have had other calls before.
        ended: whether Triton has said all there is to say, so that the stream may be used again.
        expired: whether the time was up. gRPC's deadline would be the stream's, not the call's, and
            wait_for() around each read would make a task each time.
    """

    def __init__(self, stream: _Stream, request_id: str) -> None:
        self.stream = stream
        self.ended = False
        self.expired = False
        self._request_id = request_id

    def expire(self) -> None:
        """End the call, because its time is up."""
        self.expired = True
        self.stream.cancel()

    async def send(self, request: bytes) -> None:
        """Send the call's only message, a ModelInferRequest."""
        try:
            await self.stream.write(request)
        except grpc.aio.AioRpcError as error:
            # The stream has broken; gRPC may not know yet by what.
            raise ModelUnavailableError(_UNAVAILABLE) from error

    async def next_answer(self) -> Answer:
        """The next response; CaptionServeError where there is an error in its place, or an end."""
        while True:
            response: Any = await self.stream.read()
            if response is grpc.aio.EOF:
                raise ModelFaultError(_NO_ANSWER)
            received = response.infer_response
            # What the call before, which had its answer, has left behind, is none of this one's.
            if not received.id or received.id == self._request_id:
                break
        if response.error_message:
            self.ended = True
            raise error_of_triton(grpc.StatusCode.INTERNAL, response.error_message)
        answer = _answer(received)
        self.ended = answer.is_final
        if not self.ended and received.parameters[_IS_FINAL].bool_param:
            raise ModelFaultError(_NO_ANSWER)
        return answer


def _answer(response: service_pb2.ModelInferResponse) -> Answer:
    try:
        return Answer(read_outputs(response, _OUTPUTS), int(response.model_version))
    except ValueError as error:
        raise ModelFaultError(_UNREADABLE) from error


def error_of_triton(code: grpc.StatusCode, details: str) -> CaptionServeError:
    """What a failed call to Triton means to the caller.

    Args:
        code: the call's status code.
        details: Triton's text, which may be one of our own errors as JSON.
    """
    own = wire.error_of_text(details)
    if own is not None:
        return own
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(_TOO_LATE)
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
