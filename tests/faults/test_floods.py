"""Floods and nonsense: they cost the one who sends them, and the service goes on for all others."""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psutil
import pytest
from captionserve import CaptionClient
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from captionserve_server.serving.ready import ReadyReport

from tests.faults import http2, load
from tests.faults.conftest import MOST_STREAMS
from tests.faults.served import WAIT_SECONDS, Served, wait_until
from tests.pictures import png
from tests.reference import picture

METHODS = ("Caption", "StreamCaption", "CaptionMany", "GetModels")
SERVICE = "/captionserve.v1.CaptionService/"
MEMORY_SLACK_BYTES = 48 * 2**20


@pytest.fixture
def flooded(impatient: Served) -> ReadyReport:
    """The service that all of it is done to."""
    return ReadyReport(**impatient.report)


@pytest.fixture
def goes_on(flooded: ReadyReport) -> Iterator[str]:
    """The service's address; after the test it answers right, and nothing is in work."""
    with CaptionClient(flooded.grpc, timeout=WAIT_SECONDS) as client:
        right = [client.caption(picture(seed), bypass_cache=True).text for seed in range(8)]
        yield flooded.grpc
        wait_until(lambda: (load := client.models()).working == load.waiting == 0)
        again = [client.caption(picture(seed), bypass_cache=True).text for seed in range(8)]
        assert again == right
    assert psutil.Process(flooded.pids["triton"]).is_running()


def test_so_many_streams_are_taken_of_a_connection(goes_on: str) -> None:
    with http2.connected(goes_on, WAIT_SECONDS) as connection:
        asked = 4 * MOST_STREAMS
        for stream in range(1, 2 * asked, 2):
            connection.send(http2.call_headers(stream, SERVICE + "CaptionMany"))
        refused = (kind for kind, _, _ in connection.frames() if kind == http2.RST_STREAM)
        more = asked - MOST_STREAMS
        assert len(list(itertools.islice(refused, more))) == more


def test_a_flood_of_pings_ends_the_connection(goes_on: str) -> None:
    with http2.connected(goes_on, WAIT_SECONDS) as connection:
        connection.send(1000 * http2.frame(http2.PING, 0, 0, bytes(8)))
        ends = [payload for kind, _, payload in connection.frames() if kind == http2.GOAWAY]
    assert struct.unpack(">I", ends[-1][4:8]) == (http2.ENHANCE_YOUR_CALM,)


def test_streams_that_are_begun_and_reset_leave_nothing(goes_on: str, flooded: ReadyReport) -> None:
    gateway = psutil.Process(flooded.pids["gateway"])
    before = gateway.memory_full_info().uss
    reset = struct.pack(">I", http2.CANCEL)
    with http2.connected(goes_on, WAIT_SECONDS) as connection:
        for stream in range(1, 10_000, 2):
            connection.send(http2.call_headers(stream, SERVICE + "Caption"))
            connection.send(http2.frame(http2.RST_STREAM, 0, stream, reset))
    assert gateway.memory_full_info().uss < before + MEMORY_SLACK_BYTES


def test_calls_that_are_cancelled_at_random_moments_leave_nothing(goes_on: str) -> None:
    chance = random.Random(1)
    request = load.request_of(png(picture(1)), num_beams=4)
    stream = caption_pb2.StreamCaptionRequest(
        request=caption_pb2.CaptionRequest.FromString(request)
    ).SerializeToString()

    async def one(channel: grpc.aio.Channel, turn: asyncio.Semaphore) -> bool:
        async with turn:
            whole: Any = channel.unary_unary(SERVICE + "Caption")
            streamed: Any = channel.unary_stream(SERVICE + "StreamCaption")
            begin, message = chance.choice(((whole, request), (streamed, stream)))
            call = begin(message, timeout=WAIT_SECONDS)
            code = asyncio.ensure_future(call.code())
            # Within a millisecond or ten: a fast machine answers many before the latter.
            await asyncio.wait([code], timeout=chance.expovariate(chance.choice((100, 1000))))
            return bool(call.cancel())

    async def storm() -> int:
        async with grpc.aio.insecure_channel(goes_on) as channel:
            turn = asyncio.Semaphore(MOST_STREAMS)
            return sum(await asyncio.gather(*(one(channel, turn) for _ in range(2000))))

    assert asyncio.run(storm()) > 1000


def mutations(valid: bytes, count: int, chance: random.Random) -> Iterator[bytes]:
    """The bytes with some of them changed, taken out, put in or said twice."""
    for _ in range(count):
        made = bytearray(valid)
        for _ in range(chance.randint(1, 6)):
            # What says what follows stands before the image, and behind it.
            place = min(int(chance.expovariate(1 / 16)), len(made) - 1)
            place = place if chance.random() < 0.5 else len(made) - 1 - place
            match chance.randrange(4):
                case 0:
                    made[place] = chance.randrange(256)
                case 1:
                    del made[place : place + chance.randint(1, 4)]
                case 2:
                    made[place:place] = chance.randbytes(chance.randint(1, 8))
                case _:
                    made += made[place : place + chance.randint(1, 64)]
            made = made or bytearray(1)
        yield bytes(made)


def test_fuzzed_messages_are_refused_in_words_or_captioned(goes_on: str) -> None:
    chance = random.Random(2)
    request = caption_pb2.CaptionRequest.FromString(
        load.request_of(png(picture(1)), num_beams=2, prefix="a", max_length=8, seed=3)
    )
    valid: dict[str, Any] = {
        "Caption": request,
        "StreamCaption": caption_pb2.StreamCaptionRequest(request=request),
        "CaptionMany": caption_pb2.CaptionManyRequest(id="1", request=request),
    }

    async def ask(channel: grpc.aio.Channel, method: str, message: bytes) -> Counter[str]:
        size = (("captionserve-request-bytes", str(len(message))),)
        begin: Any = channel.stream_stream(SERVICE + method)
        call = begin(iter([message]), metadata=size)
        codes: Counter[str] = Counter()
        try:
            async for answer in call:
                if method == "CaptionMany":
                    result = caption_pb2.CaptionManyResponse.FromString(answer).result
                    codes[f"item {result.error.code}"] += 1
        except grpc.aio.AioRpcError as error:
            if error.code().name not in ("INVALID_ARGUMENT", "NOT_FOUND"):
                return Counter({f"{error.code().name}: {error.details()}": 1})
        codes[(await call.code()).name] += 1
        return codes

    async def fuzz() -> Counter[str]:
        async with grpc.aio.insecure_channel(goes_on) as channel:
            found: Counter[str] = Counter()
            for method, message in valid.items():
                raw = message.SerializeToString()
                made = mutations(raw, 150, chance)
                while some := list(itertools.islice(made, MOST_STREAMS // 2)):
                    for codes in await asyncio.gather(*(ask(channel, method, m) for m in some)):
                        found += codes
            return found

    found = asyncio.run(fuzz())
    items = {f"item {code.value[0]}" for code in (grpc.StatusCode.OK, *REFUSALS)}
    assert set(found) <= items | {"OK"} | {code.name for code in REFUSALS}, found
    assert found["INVALID_ARGUMENT"] > 50


REFUSALS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


def test_fuzzed_bytes_on_the_port_disturb_nobody(goes_on: str) -> None:
    chance = random.Random(3)
    opening = http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0, b"")
    for number in range(150):
        content = opening if number % 3 else b""
        for _ in range(chance.randint(1, 30)):
            if chance.random() < 0.3:
                content += http2.call_headers(2 * chance.randrange(8) + 1, SERVICE + "Caption")
            payload = chance.randbytes(chance.choice((0, 4, 8, 40)))
            made = http2.frame(
                chance.randrange(12), chance.randrange(256), chance.randrange(16), payload
            )
            content += made if chance.random() < 0.9 else chance.randbytes(30)
        with http2.connected(goes_on, WAIT_SECONDS, content) as connection:
            connection.end()
            for _ in connection.frames():
                pass


def test_who_sends_items_and_reads_no_answer_is_held_up(goes_on: str, flooded: ReadyReport) -> None:
    gateway = psutil.Process(flooded.pids["gateway"])
    before = gateway.memory_full_info().uss
    sent = itertools.count()
    request = caption_pb2.CaptionRequest.FromString(load.request_of(png(picture(1))))
    last = 0

    def items() -> Iterator[caption_pb2.CaptionManyRequest]:
        nonlocal last
        for last in sent:
            yield caption_pb2.CaptionManyRequest(id=f"{last:0128}", request=request)

    # Without probes of the bandwidth the client takes in 64 KiB that it does not read.
    options = [("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(goes_on, options) as channel, CaptionClient(goes_on) as client:
        stub: Any = caption_pb2_grpc.CaptionServiceStub(channel)
        call = stub.CaptionMany(items())
        assert next(call).window.items > 0
        wait_until(lambda: last > 100)
        # It is held up when nothing is in work though there would be more to send.
        wait_until(lambda: stays(lambda: (last, client.models().working)))
        assert last < 10_000
        assert gateway.memory_full_info().uss < before + MEMORY_SLACK_BYTES
        call.cancel()


def stays(value: Callable[[], object]) -> bool:
    """Whether a value is the same a hundred times."""
    first = value()
    return all(value() == first for _ in range(100))
