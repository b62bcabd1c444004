"""What surrounds every call: failures become statuses, and caption calls are counted.

Without the first, gRPC would show a caller the text of whatever exception escapes a handler.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from structlog.contextvars import clear_contextvars

from captionserve_server.core.errors import CaptionServeError, InvalidRequestError
from captionserve_server.gateway.identity import Identities
from captionserve_server.gateway.metrics import GatewayMetrics
from captionserve_server.gateway.status import rpc_status
from captionserve_server.tracing import TRACE_HEADERS, Traces, record_code

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
# Generic in the type stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"
Behaviour = Callable[[Any, Context], Any]
Around = Callable[[Context], AbstractAsyncContextManager[None]]

# The caller's clock runs out first, and its cancellation may overtake the server's own clock: gRPC
# tells the server a time rounded up, by 1 % at most, which begins when the call arrives.
_CLOCKS_APART_SECONDS = 0.02
_CLOCKS_APART_SHARE = 0.01

_HANDLER_KINDS: dict[str, Callable[..., Any]] = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Maps everything that escapes a handler to a status, by the table in `status`."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Put the mapping around the call's handler."""
        handler = await continuation(handler_call_details)
        return None if handler is None else _rewrapped(_checked(handler), _errors_mapped)


class IdentityInterceptor(grpc.aio.ServerInterceptor):
    """Lets only callers that are known come to a service of another's making."""

    def __init__(self, service: str, identities: Identities) -> None:
        """Guard `service`, named with its package."""
        self._prefix = f"/{service}/"
        self._identities = identities

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Put the question before the call's handler."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        return _rewrapped(handler, self._known)

    @asynccontextmanager
    async def _known(self, context: Context) -> AsyncIterator[None]:
        self._identities.of(context)
        yield


class ObservingInterceptor(grpc.aio.ServerInterceptor):
    """Counts, logs and traces the calls of one service."""

    def __init__(self, service: str, metrics: GatewayMetrics, traces: Traces) -> None:
        """Observe the calls of `service`, named with its package."""
        self._service = service
        self._metrics = metrics
        self._traces = traces

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Put the observing around the call's handler."""
        handler = await continuation(handler_call_details)
        service, _, method = handler_call_details.method.removeprefix("/").partition("/")
        if handler is None or service != self._service:
            return handler
        return _rewrapped(handler, partial(self._observed, method))

    @asynccontextmanager
    async def _observed(self, method: str, context: Context) -> AsyncIterator[None]:
        allowed = context.time_remaining()
        clear_contextvars()
        carrier = {
            name: str(value)
            for name, value in context.invocation_metadata() or ()
            if name in TRACE_HEADERS
        }
        with (
            self._traces.call(self._service, method, carrier) as span,
            self._metrics.call(method) as record,
        ):
            try:
                yield
            except grpc.aio.AbortError:
                record.code = context.code()
                raise
            # A call that nobody waits for any more ends as CancelledError, as GeneratorExit where a
            # stream was writing, or as the failure of an abort that came too late.
            except BaseException:
                record.code = _cancellation_code(allowed, context.time_remaining())
                raise
            finally:
                record_code(span, record.code.value[0])


@asynccontextmanager
async def _errors_mapped(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except CaptionServeError as error:
        await _abort(context, error)
    except Exception:
        _log.exception("a handler failed")
        await _abort(context, CaptionServeError("the server failed"))


async def _abort(context: Context, error: CaptionServeError) -> None:
    status = rpc_status(error)
    await context.abort(status.code, status.message, status.trailing_metadata)


def _cancellation_code(allowed: float | None, remaining: float | None) -> grpc.StatusCode:
    """Tell apart why gRPC cancelled a handler: the caller gave up, or the deadline passed.

    Args:
        allowed: seconds that the call had when it came; None without a deadline.
        remaining: seconds that it has left; likewise.
    """
    if allowed is None or remaining is None:
        return grpc.StatusCode.CANCELLED
    if remaining <= _CLOCKS_APART_SECONDS + _CLOCKS_APART_SHARE * allowed:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _checked(handler: Handler) -> Handler:
    """The same handler, refusing bytes that are no message from within its call.

    gRPC deserialises outside of every interceptor's wrapper and would show the exception's text.
    """
    deserialize = handler.request_deserializer
    if deserialize is None or handler.request_streaming:
        return handler

    def message(request: bytes) -> object:
        try:
            return deserialize(request)
        except DecodeError as error:
            raise InvalidRequestError("the request is not a valid message") from error

    kind = "unary_stream" if handler.response_streaming else "unary_unary"
    behaviour: Behaviour = getattr(handler, kind)

    async def call(request: bytes, context: Context) -> object:
        return await behaviour(message(request), context)

    async def stream(request: bytes, context: Context) -> AsyncIterator[object]:
        async with aclosing(behaviour(message(request), context)) as responses:
            async for response in responses:
                yield response

    checked: Handler = _HANDLER_KINDS[kind](
        _same_form(behaviour, call, stream), None, handler.response_serializer
    )
    return checked


def _rewrapped(handler: Handler, around: Around) -> Handler:
    """The same handler with a context manager around each call."""
    for kind, make in _HANDLER_KINDS.items():
        behaviour = getattr(handler, kind)
        if behaviour is not None:
            rewrapped: Handler = make(
                _surrounded(behaviour, around),
                handler.request_deserializer,
                handler.response_serializer,
            )
            return rewrapped
    return handler


def _surrounded(behaviour: Behaviour, around: Around) -> Behaviour:
    async def call(request: object, context: Context) -> object:
        async with around(context):
            return await behaviour(request, context)

    async def stream(request: object, context: Context) -> AsyncIterator[object]:
        async with around(context), aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    return _same_form(behaviour, call, stream)


def _same_form(behaviour: Behaviour, call: Behaviour, stream: Behaviour) -> Behaviour:
    """Whichever is written as the behaviour is: gRPC tells the two ways of streaming apart so."""
    return stream if inspect.isasyncgenfunction(behaviour) else call
