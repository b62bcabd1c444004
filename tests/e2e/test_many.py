"""caption_many of both clients through the whole stack, and connections that come and go."""

from __future__ import annotations

import asyncio
import itertools
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from captionserve import (
    AsyncCaptionClient,
    CaptionClient,
    CaptionError,
    CaptionResult,
    GenerationOptions,
    Outcome,
)
from captionserve_server.serving.ready import ReadyReport
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import DEMO
from tests.faults.served import Served, serving, wait_until
from tests.pictures import numbered, pictures, png

TIMEOUT_SECONDS = 60.0
WINDOW = 6
OPTIONS = GenerationOptions(num_beams=3, num_return_sequences=2)
# Neither the connection nor a call of many lives longer.
AGE_SECONDS = 5

Service = Callable[[str], ReadyReport]
Many = Callable[..., list[Outcome]]


def many_blocking(target: str, images: Iterable[Any], *options: Any, **named: Any) -> list[Outcome]:
    with CaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
        return list(client.caption_many(images, *options, **named))


def many_async(target: str, images: Iterable[Any], *options: Any, **named: Any) -> list[Outcome]:
    async def coming() -> AsyncIterator[Any]:
        for image in images:
            yield image

    async def run() -> list[Outcome]:
        async with AsyncCaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
            return [each async for each in client.caption_many(coming(), *options, **named)]

    return asyncio.run(run())


@pytest.fixture(params=[many_blocking, many_async])
def many(request: pytest.FixtureRequest) -> Many:
    """All outcomes of one caption_many with a client of its own."""
    call: Many = request.param
    return call


@pytest.fixture(scope="module")
def short_lived(
    model_repository: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A service whose connections do not live long."""
    arguments = ("--connection-age-seconds", str(AGE_SECONDS), "--connection-idle-seconds", "1")
    folder = tmp_path_factory.mktemp("short-lived")
    with serving(model_repository(DEMO), folder, *arguments) as served:
        yield served


def calls_ended(served: Served, method: str) -> int:
    with urllib.request.urlopen(f"http://{served.report['metrics']}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    ended = (s for s in samples if s.name == "captionserve_requests_total")
    return int(sum(s.value for s in ended if s.labels["method"] == method))


@pytest.mark.parametrize("ordered", [True, False])
def test_many_are_captioned_as_one_is_and_each_once(
    ordered: bool, service: Service, many: Many
) -> None:
    target = service(DEMO).grpc
    images: list[Any] = [png(image) for image in pictures(DEMO, 8)]
    with CaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
        expected = [client.caption(image, OPTIONS, bypass_cache=True) for image in images]
    # Cut off, of another kind, and not there.
    images[3:3] = [images[0][: len(images[0]) // 2]]
    images[7:7] = [b"no image", "/no/such/file.png"]
    outcomes = many(target, images, OPTIONS, window=WINDOW, ordered=ordered, bypass_cache=True)
    indices = [outcome.index for outcome in outcomes]
    assert indices == list(range(11)) if ordered else sorted(indices) == list(range(11))
    outcomes.sort(key=lambda outcome: outcome.index)
    errors = {o.index: getattr(o.error, "reason", type(o.error)) for o in outcomes if o.error}
    assert errors == {3: "IMAGE_CORRUPT", 7: "UNSUPPORTED_IMAGE_FORMAT", 8: FileNotFoundError}
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    assert [texts(result) for result in results] == [texts(result) for result in expected]


def texts(result: CaptionResult) -> list[str]:
    return [caption.text for caption in result.captions]


def test_no_more_is_pulled_than_the_window(service: Service) -> None:
    (image,) = pictures(DEMO, 1)
    pulled = 0

    def endless() -> Iterator[bytes]:
        nonlocal pulled
        while True:
            pulled += 1
            yield numbered(png(image), pulled)

    with CaptionClient(service(DEMO).grpc, timeout=TIMEOUT_SECONDS) as client:
        outcomes = client.caption_many(endless(), window=WINDOW)
        for given in range(1, 30):
            assert next(outcomes).result is not None
            assert pulled <= given + WINDOW
        outcomes.close()


def test_many_outlive_their_connection(short_lived: Served) -> None:
    target = short_lived.report["grpc"]
    files = [png(image) for image in pictures(DEMO, 8)]
    before = calls_ended(short_lived, "CaptionMany")

    def until_calls_have_ended(first: int) -> Iterator[bytes]:
        for number in itertools.count():
            if calls_ended(short_lived, "CaptionMany") >= before + 2:
                return
            yield numbered(files[number % len(files)], first + number)

    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(many, target, until_calls_have_ended(first), window=WINDOW)
            for many, first in ((many_blocking, 0), (many_async, 10**6))
        ]
        outcomes = [call.result() for call in both]
    assert calls_ended(short_lived, "CaptionMany") >= before + 4, "each went on in another call"
    with CaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
        right = [client.caption(file).text for file in files]
    for each in outcomes:
        assert [outcome.index for outcome in each] == list(range(len(each)))
        results = [outcome.result for outcome in each if outcome.result is not None]
        assert [result.text for result in results] == [
            right[number % len(files)] for number in range(len(each))
        ]
        # The second time it would have been remembered.
        assert not any(result.cached for result in results)


def test_an_idle_connection_is_opened_again(short_lived: Served) -> None:
    target = short_lived.report["grpc"]
    (image,) = pictures(DEMO, 1)

    _, _, port = target.rpartition(":")

    def ports() -> set[int]:
        """Ours, of the connections to the service."""
        return {
            c.laddr.port
            for c in psutil.Process().net_connections("tcp")
            if c.status == psutil.CONN_ESTABLISHED and c.raddr.port == int(port)
        }

    wait_until(lambda: not ports())
    before = calls_ended(short_lived, "Caption")
    with CaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
        client.caption(image)
        first = ports()
        assert first
        wait_until(lambda: not first & ports())
        client.caption(image)

    async def run() -> None:
        async with AsyncCaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
            await client.caption(image)
            first = ports()
            assert first
            await asyncio.to_thread(wait_until, lambda: not first & ports())
            await client.caption(image)

    asyncio.run(run())
    assert calls_ended(short_lived, "Caption") == before + 4, "none was tried again"


def test_closing_the_client_ends_many_alike(service: Service) -> None:
    target = service(DEMO).grpc
    file = png(pictures(DEMO, 1)[0])
    with CaptionClient(target) as client:
        outcomes = client.caption_many(numbered(file, number) for number in range(100))
        next(outcomes)
        client.close()
        with pytest.raises(CaptionError) as raised:
            list(outcomes)
    assert raised.value.reason == "CLIENT_CLOSED"

    async def run() -> None:
        async with AsyncCaptionClient(target) as client:
            outcomes = client.caption_many(numbered(file, number) for number in range(100))
            await anext(outcomes)
            await client.close()
            with pytest.raises(CaptionError) as raised:
                async for _ in outcomes:
                    pass
        assert raised.value.reason == "CLIENT_CLOSED"

    asyncio.run(run())
