"""Making the calls: each when it is due, whatever has become of those before it.

They cost the generator little, so that it keeps up: requests are bytes already, and no typed client
with its attempts stands between. `generator` gives it a process of its own, which the service's
callers would be as well.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from captionserve import tls_credentials
from captionserve.v1 import caption_pb2

from captionserve_server.bench.load.arrivals import Arrival
from captionserve_server.bench.load.figures import ANSWERED, Call

METHOD = "/captionserve.v1.CaptionService/Caption"

# From the last preparation to the first call, so that nothing else is done when it is due.
_BEGIN_SECONDS = 0.1
_CONNECT_SECONDS = 30.0
_OPTIONS: tuple[tuple[str, Any], ...] = (
    # Connections to one address would be one, were they not told apart.
    ("grpc.use_local_subchannel_pool", 1),
    # A call that is tried again would be two calls.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
)


@dataclass(frozen=True)
class Service:
    """Whom to ask, as whom; it can be sent to another process.

    Attributes:
        target: as gRPC names it; several addresses behind it get calls in turn.
        tls: files with the CA, and the caller's certificate and key, None where there is none;
            without any, TLS is not spoken.
        token: who asks, if anybody.
    """

    target: str
    tls: tuple[Path | None, Path | None, Path | None] = (None, None, None)
    token: str | None = field(default=None, repr=False)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For TLS, if it is to be spoken."""
        return tls_credentials(*self.tls) if any(self.tls) else None


@dataclass(frozen=True)
class Offered:
    """A load that was offered.

    Attributes:
        calls: what became of each call.
        seconds: from the beginning until the last call ended.
        cpu_seconds: processor time that the generator took.
    """

    calls: list[Call]
    seconds: float
    cpu_seconds: float


Offer = Callable[[Sequence[Arrival]], Offered]
"""Makes the calls of a load and waits until all have ended."""


def request_of(image: bytes, *, repeated: bool, options: dict[str, int]) -> bytes:
    """A request; one that is not a repeated one is computed each time."""
    return caption_pb2.CaptionRequest(
        image=caption_pb2.Image(encoded=image),
        options=caption_pb2.GenerationOptions(**options),  # type: ignore[arg-type]
        bypass_cache=not repeated,
    ).SerializeToString()


def metadata_of(request: bytes, token: str | None) -> tuple[tuple[str, str], ...]:
    """What goes ahead of a call: how large its request is, and who asks."""
    size = ("captionserve-request-bytes", str(len(request)))
    return (size,) if token is None else (size, ("authorization", f"Bearer {token}"))


async def in_time(due: Sequence[float], call: Callable[[int, float], Awaitable[object]]) -> None:
    """Begin a call at each time, and return when all of them have ended.

    Args:
        due: when, by time.monotonic(), in order. One whose time has passed is begun at once.
        call: gets the number of each call, and when it was due.
    """
    calls = []
    for number, when in enumerate(due):
        await asyncio.sleep(max(0.0, when - time.monotonic()))
        calls.append(asyncio.ensure_future(call(number, when)))
    await asyncio.gather(*calls)


@contextmanager
def generator(
    service: Service,
    images: Sequence[bytes],
    options: dict[str, int],
    *,
    connections: int,
    deadline: float,
) -> Iterator[Offer]:
    """A generator of load in a process of its own.

    Args:
        service: whom to ask.
        images: files, that an Arrival names by their place.
        options: of every caption.
        connections: calls take them in turn.
        deadline: seconds from when a call is due.

    Yields:
        what offers a load.
    """
    made = [
        {
            repeated: request_of(image, repeated=repeated, options=options)
            for repeated in (False, True)
        }
        for image in images
    ]
    others = multiprocessing.active_children()
    # Not forked: gRPC has threads in this process by now.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:

        def offer(arrivals: Sequence[Arrival]) -> Offered:
            requests = [made[each.image][each.repeated] for each in arrivals]
            due = [each.due for each in arrivals]
            return pool.submit(_run, service, requests, due, connections, deadline).result()

        try:
            yield offer
        except BaseException:
            # Whoever is interrupted does not wait until the load has come to its end.
            for child in set(multiprocessing.active_children()).difference(others):
                child.terminate()
            raise


def _run(
    service: Service,
    requests: Sequence[bytes],
    due: Sequence[float],
    connections: int,
    deadline: float,
) -> Offered:
    return asyncio.run(_offered(service, requests, due, connections, deadline))


async def _offered(
    service: Service,
    requests: Sequence[bytes],
    due: Sequence[float],
    connections: int,
    deadline: float,
) -> Offered:
    calls: list[Call] = []
    async with _connected(service, connections) as methods:
        begin, cpu_begin = time.monotonic() + _BEGIN_SECONDS, time.process_time()

        async def call(number: int, when: float) -> None:
            request, method = requests[number], methods[number % connections]
            sent = time.monotonic()
            try:
                answer = await method(
                    request,
                    timeout=max(0.0, when + deadline - sent),
                    metadata=metadata_of(request, service.token),
                )
                code, cached = ANSWERED, answer.cached
            except grpc.aio.AioRpcError as error:
                code, cached = error.code().name, False
            ended = time.monotonic()
            calls.append(Call(when - begin, sent - begin, ended - begin, code, cached))

        await in_time([begin + seconds for seconds in due], call)
        return Offered(calls, time.monotonic() - begin, time.process_time() - cpu_begin)


@asynccontextmanager
async def _connected(service: Service, connections: int) -> AsyncIterator[list[Any]]:
    """The method to call, on each of so many connections that stand."""
    credentials = service.credentials()
    async with AsyncExitStack() as stack:
        channels: list[grpc.aio.Channel] = []
        for _ in range(connections):
            if credentials is None:
                channel = grpc.aio.insecure_channel(service.target, options=_OPTIONS)
            else:
                channel = grpc.aio.secure_channel(service.target, credentials, options=_OPTIONS)
            channels.append(await stack.enter_async_context(channel))
        ready = asyncio.gather(*(channel.channel_ready() for channel in channels))
        await asyncio.wait_for(ready, _CONNECT_SECONDS)
        read = caption_pb2.CaptionResponse.FromString
        yield [channel.unary_unary(METHOD, response_deserializer=read) for channel in channels]
