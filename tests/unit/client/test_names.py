"""What both clients do when all the addresses behind a name have changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from captionserve import AsyncCaptionClient, CaptionClient

from tests.name_server import Name
from tests.unit.client.caption_server import WAIT_SECONDS, caption_server, unused_address

IMAGE = b"an image"
OLD, NEW = "127.0.0.2", "127.0.0.3"


@pytest.fixture
def name() -> Iterator[Name]:
    name = Name("captions.example")
    with name.served():
        yield name


def call_twice(target: str, meanwhile: Callable[[], None]) -> None:
    with CaptionClient(target, timeout=WAIT_SECONDS) as client:
        client.caption(IMAGE)
        meanwhile()
        client.caption(IMAGE)


def call_twice_async(target: str, meanwhile: Callable[[], None]) -> None:
    async def run() -> None:
        async with AsyncCaptionClient(target, timeout=WAIT_SECONDS) as client:
            await client.caption(IMAGE)
            meanwhile()
            await client.caption(IMAGE)

    asyncio.run(run())


@pytest.mark.parametrize("call", [call_twice, call_twice_async])
def test_who_has_taken_over_is_found_in_time(
    call: Callable[[str, Callable[[], None]], None], name: Name
) -> None:
    port = int(unused_address().rpartition(":")[2])
    with ExitStack() as old, caption_server(f"{NEW}:{port}") as (_, servicer):
        old.enter_context(caption_server(f"{OLD}:{port}"))
        name.tell([OLD])

        def take_over() -> None:
            name.tell([NEW])
            old.close()

        call(name.target(port), take_over)
        assert len(servicer.requests) == 1
