"""The clients at real gateways: TLS, certificates and tokens, and several addresses."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from captionserve import (
    AsyncCaptionClient,
    CaptionClient,
    CaptionError,
    Outcome,
    tls_credentials,
)
from captionserve_server.gateway.tokens import create_token

from tests.certificates import CertificateFiles, certificate_pem, issued, key_pem
from tests.unit.gateway.harness import IMAGE, Setup, gateway_setup

TEXT = "a red apple"


def ask_all(target: str, **client: Any) -> None:
    """Make each kind of call, blocking."""
    with CaptionClient(target, **client) as blocking:
        blocking.wait_ready(10)
        assert blocking.models().models[0].version == 3
        assert blocking.caption(IMAGE).text == TEXT
        *_, update = blocking.caption_stream(IMAGE)
        assert update.result is not None
        (outcome,) = blocking.caption_many([IMAGE])
        assert outcome.result is not None


async def ask_all_async(target: str, **client: Any) -> None:
    async with AsyncCaptionClient(target, **client) as waiting:
        await waiting.wait_ready(10)
        assert (await waiting.models()).models[0].version == 3
        assert (await waiting.caption(IMAGE)).text == TEXT
        updates = [update async for update in waiting.caption_stream(IMAGE)]
        assert updates[-1].result is not None
        (outcome,) = [outcome async for outcome in waiting.caption_many([IMAGE])]
        assert outcome.result is not None


async def refusals(target: str, **client: Any) -> set[str]:
    """The reasons for which each kind of call of both clients is refused."""
    reasons = set()
    with CaptionClient(target, timeout=1, **client) as blocking:
        for call in (
            lambda: blocking.caption(IMAGE),
            lambda: list(blocking.caption_stream(IMAGE)),
            lambda: list(blocking.caption_many([IMAGE])),
            lambda: blocking.models(),
        ):
            with pytest.raises(CaptionError) as raised:
                await asyncio.to_thread(call)
            reasons.add(raised.value.reason)
    async with AsyncCaptionClient(target, timeout=1, **client) as waiting:
        for stream in (waiting.caption_stream(IMAGE), waiting.caption_many([IMAGE])):
            with pytest.raises(CaptionError) as raised:
                async for _ in stream:
                    pass
            reasons.add(raised.value.reason)
        for answer in (waiting.caption(IMAGE), waiting.models()):
            with pytest.raises(CaptionError) as raised:
                await answer
            reasons.add(raised.value.reason)
    return reasons


def test_a_token_over_tls(tmp_path: Path) -> None:
    files = CertificateFiles(tmp_path)
    known = {"credentials": tls_credentials(files.ca), "token": create_token(files.tokens, "alice")}

    async def run() -> None:
        async with gateway_setup(**files.settings, tokens=files.tokens) as setup:
            await asyncio.to_thread(ask_all, setup.gateway.address, **known)
            await ask_all_async(setup.gateway.address, **known)
            for token in (None, "another"):
                stranger = {**known, "token": token}
                assert await refusals(setup.gateway.address, **stranger) == {"UNAUTHENTICATED"}

    asyncio.run(run())


def test_a_certificate_of_ones_own(tmp_path: Path) -> None:
    files = CertificateFiles(tmp_path)
    alice = issued("alice", files.authority)
    credentials = tls_credentials(files.ca, certificate_pem(alice), key_pem(alice))

    async def run() -> None:
        async with gateway_setup(**files.settings, tls_client_ca=files.ca) as setup:
            await asyncio.to_thread(ask_all, setup.gateway.address, credentials=credentials)
            await ask_all_async(setup.gateway.address, credentials=credentials)

    asyncio.run(run())


def text_of(outcome: Outcome) -> str:
    """The caption, or what is wrong."""
    return str(outcome.error) if outcome.result is None else outcome.result.text


def test_two_gateways_share_the_calls_and_one_may_end() -> None:
    stopped = threading.Event()
    numbers = itertools.count()

    def images() -> Iterator[bytes]:
        while not stopped.is_set():
            yield b"%d" % next(numbers)

    def blocking(client: CaptionClient) -> list[str]:
        return [client.caption(image).text for image in images()]

    def many_blocking(client: CaptionClient) -> list[str]:
        return [text_of(outcome) for outcome in client.caption_many(images())]

    async def waiting(client: AsyncCaptionClient) -> list[str]:
        return [(await client.caption(image)).text for image in images()]

    async def many_waiting(client: AsyncCaptionClient) -> list[str]:
        return [text_of(outcome) async for outcome in client.caption_many(images())]

    async def asked(setup: Setup, count: int) -> None:
        count += len(setup.triton.requests)
        while len(setup.triton.requests) < count:
            await asyncio.sleep(0.01)

    async def run() -> list[str]:
        async with gateway_setup() as one, gateway_setup() as other:
            target = f"ipv4:{one.gateway.address},{other.gateway.address}"
            with CaptionClient(target) as client:
                async with AsyncCaptionClient(target) as async_client:
                    tasks = [
                        asyncio.create_task(asyncio.to_thread(blocking, client)),
                        asyncio.create_task(asyncio.to_thread(many_blocking, client)),
                        asyncio.create_task(waiting(async_client)),
                        asyncio.create_task(many_waiting(async_client)),
                    ]
                    try:
                        for setup in (one, other):
                            await asyncio.wait_for(asked(setup, 50), 30)
                        await one.gateway.drain(asyncio.Event())
                        await asyncio.wait_for(asked(other, 100), 30)
                    finally:
                        stopped.set()
                    return [text for texts in await asyncio.gather(*tasks) for text in texts]

    answers = asyncio.run(run())
    assert set(answers) == {TEXT}
    assert len(answers) == next(numbers), "every image has its answer"
