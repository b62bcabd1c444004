"""Callers that cost little: their requests are bytes already, their answers stay bytes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from captionserve.v1 import caption_pb2
from google.rpc import error_details_pb2, status_pb2

METHOD = "/captionserve.v1.CaptionService/Caption"


@dataclass(frozen=True)
class Asked:
    """What a caller asks for, again and again.

    Attributes:
        target: whom.
        request: the serialized CaptionRequest.
        timeout: seconds of each call.
        token: who asks, if anybody.
    """

    target: str
    request: bytes
    timeout: float = 30.0
    token: str | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes ahead of each call."""
        size = ("captionserve-request-bytes", str(len(self.request)))
        return (size,) if self.token is None else (size, ("authorization", f"Bearer {self.token}"))


@dataclass
class Outcomes:
    """What became of a caller's calls.

    Attributes:
        codes: how many ended with each status code, by its name.
        answered: when each answer came, by time.monotonic().
        refused_after: seconds until each refusal.
        unsaid: refusals that lack a part of what they should say.
    """

    codes: Counter[str] = field(default_factory=Counter)
    answered: list[float] = field(default_factory=list)
    refused_after: list[float] = field(default_factory=list)
    unsaid: list[str] = field(default_factory=list)


def request_of(image: bytes, **options: Any) -> bytes:
    """A request that is computed each time it is made."""
    return caption_pb2.CaptionRequest(
        image=caption_pb2.Image(encoded=image),
        options=caption_pb2.GenerationOptions(**options),
        bypass_cache=True,
    ).SerializeToString()


class Caller:
    """Calls over one connection."""

    def __init__(self, channel: grpc.aio.Channel, asked: Asked) -> None:
        self._call: Any = channel.unary_unary(METHOD)
        self._asked = asked
        self.outcomes = Outcomes()

    async def once(self) -> float:
        """One call; how long the server asks to be left alone, in seconds."""
        begin = time.monotonic()
        asked, outcomes = self._asked, self.outcomes
        try:
            await self._call(asked.request, timeout=asked.timeout, metadata=asked.metadata)
        except grpc.aio.AioRpcError as error:
            outcomes.codes[error.code().name] += 1
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                return 0.0
            outcomes.refused_after.append(time.monotonic() - begin)
            delay, unsaid = _said_of(error)
            if unsaid:
                outcomes.unsaid.append(unsaid)
            return delay
        outcomes.codes["OK"] += 1
        outcomes.answered.append(time.monotonic())
        return 0.0


def _said_of(error: grpc.aio.AioRpcError) -> tuple[float, str]:
    """The delay that a refusal for overload asks for, and what it lacks."""
    metadata: dict[str, Any] = dict(error.trailing_metadata())
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for packed in status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details:
        for detail in (info, retry):
            packed.Unpack(detail)
    delay = retry.retry_delay.ToMilliseconds()
    if (info.domain, info.reason) != ("captionserve", "OVERLOADED"):
        return delay / 1e3, f"the reason is {info.reason!r}"
    if not delay or metadata.get("grpc-retry-pushback-ms") != str(delay):
        return delay / 1e3, f"the delay is {delay} ms"
    return delay / 1e3, ""


@contextlib.asynccontextmanager
async def caller(asked: Asked) -> AsyncIterator[Caller]:
    """A caller with a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(asked.target, options=options) as channel:
        yield Caller(channel, asked)
