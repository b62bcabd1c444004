"""How a call comes in: who calls, is there room, and only then what is asked.

Unary methods are registered as handlers of streams, which is the same on the wire: grpc.aio reads
the message of a unary call before it asks anybody, and a message may be many megabytes.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from structlog.contextvars import bind_contextvars

from captionserve_server.core.errors import DeadlineExceededError, InvalidRequestError
from captionserve_server.gateway.admission import Room
from captionserve_server.gateway.identity import Identities

# How a client says how large its request is.
SIZE_HEADER = "captionserve-request-bytes"
# How a client names a call, so that its own log and the service's can be held together.
REQUEST_ID_HEADER = "x-request-id"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

Context = grpc.aio.ServicerContext[Any, Any]
# Generic in the type stubs only.
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Call:
    """What is known of a call beside its message.

    Attributes:
        identity: who calls.
        deadline: when its answer must be there, by the event loop's clock.
        bulk: whether it comes behind what is interactive, where it does not say itself.
    """

    identity: str
    deadline: float
    bulk: bool = False

    @property
    def seconds_left(self) -> float:
        """What it may still take.

        Raises:
            DeadlineExceededError: if that is nothing.
        """
        seconds = self.deadline - asyncio.get_running_loop().time()
        if seconds <= 0:
            raise DeadlineExceededError("the deadline passed before the caption was begun")
        return seconds


class Calls:
    """Makes handlers of methods, and counts the calls that are not finished."""

    def __init__(
        self,
        identities: Identities,
        room: Room,
        *,
        max_message_bytes: int,
        deadline_cap_seconds: float,
    ) -> None:
        """Prepare.

        Args:
            identities: says who calls.
            room: what may be in flight.
            max_message_bytes: what a request takes that is not announced.
            deadline_cap_seconds: longest time a call may take, whatever its own deadline.
        """
        self._identities = identities
        self._room = room
        self._max_message_bytes = max_message_bytes
        self._deadline_cap_seconds = deadline_cap_seconds
        self._unfinished = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no call is in flight, the sending of its answer included."""
        await self._idle.wait()

    def unary(
        self, read: Callable[[bytes], Asked], behaviour: Callable[[Asked, Call], Awaitable[Message]]
    ) -> Handler:
        """The handler of a method that answers once.

        Args:
            read: what a request's bytes ask; DecodeError if they are no message.
            behaviour: answers it.
        """

        async def handle(requests: AsyncIterator[bytes], context: Context) -> Message:
            async with self._received(read, context) as (asked, call):
                return await behaviour(asked, call)

        return grpc.stream_unary_rpc_method_handler(handle, None, _serialized)

    def streaming(
        self,
        read: Callable[[bytes], Asked],
        behaviour: Callable[[Asked, Call], AsyncIterator[Message]],
    ) -> Handler:
        """The handler of a method that answers with a stream; arguments as of `unary`."""

        async def handle(
            requests: AsyncIterator[bytes], context: Context
        ) -> AsyncIterator[Message]:
            async with self._received(read, context) as (asked, call):
                answers: Any = behaviour(asked, call)
                async with aclosing(answers):
                    async for answer in answers:
                        yield answer

        return grpc.stream_stream_rpc_method_handler(handle, None, _serialized)

    def many(
        self, behaviour: Callable[[AsyncIterator[bytes], str], AsyncIterator[Message]]
    ) -> Handler:
        """The handler of a method that takes and gives streams; it is told who calls.

        The behaviour takes the messages as bytes, and has room made for each.
        """

        async def handle(
            requests: AsyncIterator[bytes], context: Context
        ) -> AsyncIterator[Message]:
            self._begin(context)
            identity = self._identify(context)
            with self._room.taken(identity, 0):
                answers: Any = behaviour(requests, identity)
                async with aclosing(answers):
                    async for answer in answers:
                        yield answer

        return grpc.stream_stream_rpc_method_handler(handle, None, _serialized)

    @contextmanager
    def item(self, identity: str, item_bytes: int, seconds: float | None) -> Iterator[Call]:
        """An item of a call of many, with room for it while the block runs.

        Args:
            identity: whose it is.
            item_bytes: what its message takes.
            seconds: how long it may take; None for the cap.

        Raises:
            OverloadedError: if there is no room.
        """
        cap = self._deadline_cap_seconds
        seconds = cap if seconds is None else min(seconds, cap)
        with self._room.taken(identity, item_bytes):
            yield Call(identity, asyncio.get_running_loop().time() + seconds, bulk=True)

    @asynccontextmanager
    async def _received(
        self, read: Callable[[bytes], Asked], context: Context
    ) -> AsyncIterator[tuple[Asked, Call]]:
        """The call and what its only message asks, with room for it while the block runs."""
        self._begin(context)
        call = Call(self._identify(context), self._deadline(context))
        announced = _announced_bytes(context, self._max_message_bytes)

        async def asked(takes: Callable[[int], None]) -> Asked:
            # In here, so that its bytes are let go of once they are read.
            raw = await _only_message(context, call.seconds_left)
            if len(raw) > announced:
                raise InvalidRequestError(f"the request is larger than {SIZE_HEADER} says")
            takes(len(raw))
            try:
                return read(raw)
            except DecodeError as error:
                raise InvalidRequestError("the request is not a valid message") from error

        with self._room.taken(call.identity, announced) as takes:
            yield await asked(takes), call

    def _identify(self, context: Context) -> str:
        """Who calls; from here on in all lines that are logged for the call."""
        bind_contextvars(request_id=_request_id(context))
        identity = self._identities.of(context)
        bind_contextvars(identity=identity)
        return identity

    def _deadline(self, context: Context) -> float:
        remaining: float | None = context.time_remaining()
        cap = self._deadline_cap_seconds
        seconds = cap if remaining is None else min(remaining, cap)
        return asyncio.get_running_loop().time() + seconds

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


def _announced_bytes(context: Context, most: int) -> int:
    """The size of the request as its metadata say, else the largest there may be."""
    for name, value in context.invocation_metadata() or ():
        if name == SIZE_HEADER:
            text = str(value)
            # Digits of other scripts are digits to Python, too.
            if not (text.isascii() and text.isdecimal() and len(text) < 16):
                raise InvalidRequestError(f"{SIZE_HEADER} is no number of bytes")
            return min(int(text), most)
    return most


def _request_id(context: Context) -> str:
    """The caller's own name for the call, where it is one that a log can show; else one of ours."""
    for name, value in context.invocation_metadata() or ():
        if name == REQUEST_ID_HEADER and _REQUEST_ID.fullmatch(str(value)):
            return str(value)
    return uuid.uuid4().hex


async def _only_message(context: Context, seconds: float) -> bytes:
    # Not from the iterator of requests, which holds what it gave last until it is collected.
    read: Awaitable[Any] = context.read()
    try:
        raw = await asyncio.wait_for(read, seconds)
    except asyncio.TimeoutError as error:
        raise DeadlineExceededError("the deadline passed before the request was there") from error
    if not isinstance(raw, bytes):
        raise InvalidRequestError("the call ended without a request")
    return raw


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()
