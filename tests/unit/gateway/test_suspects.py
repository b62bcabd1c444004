"""Images that were in work when the decoder died."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from captionserve_server.core.errors import (
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.gateway.suspects import Suspects

LONG = 20.0


@asynccontextmanager
async def at_work(suspects: Suspects, image: bytes) -> AsyncIterator[None]:
    """The decoder works on an image while the block runs."""
    async with suspects.alone(image, LONG):
        with suspects.in_work(image):
            yield


async def die_of(suspects: Suspects, *images: bytes) -> list[type[BaseException]]:
    """The decoder dies with these in work; what became of each."""
    dead = asyncio.Event()

    async def work(image: bytes) -> None:
        async with at_work(suspects, image):
            await dead.wait()
            raise ModelUnavailableError("dead")

    tasks = [asyncio.create_task(work(image)) for image in images]
    for _ in range(10):
        await asyncio.sleep(0)
    suspects.decoder_died()
    dead.set()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    return [type(outcome) for outcome in done if isinstance(outcome, BaseException)]


async def caption(suspects: Suspects, image: bytes) -> None:
    async with at_work(suspects, image):
        pass


def test_one_death_refuses_nobody() -> None:
    async def run() -> None:
        suspects = Suspects()
        assert await die_of(suspects, b"a", b"b") == [ModelUnavailableError] * 2
        await caption(suspects, b"a")

    asyncio.run(run())


def test_the_second_death_in_a_row_is_the_images_fault() -> None:
    async def run() -> None:
        suspects = Suspects()
        await die_of(suspects, b"a")
        assert await die_of(suspects, b"a") == [ModelFaultError]
        with pytest.raises(ModelFaultError):
            await caption(suspects, b"a")
        await caption(suspects, b"b")

    asyncio.run(run())


def test_who_was_captioned_meanwhile_is_no_suspect() -> None:
    async def run() -> None:
        suspects = Suspects()
        await die_of(suspects, b"a")
        await caption(suspects, b"a")
        assert await die_of(suspects, b"a") == [ModelUnavailableError]

    asyncio.run(run())


def test_deaths_that_are_not_in_a_row_do_not_count() -> None:
    async def run() -> None:
        suspects = Suspects()
        await die_of(suspects, b"a")
        await die_of(suspects, b"b")
        assert await die_of(suspects, b"a") == [ModelUnavailableError]

    asyncio.run(run())


def test_of_the_suspects_one_is_in_work_at_a_time() -> None:
    async def run() -> None:
        suspects = Suspects()
        await die_of(suspects, b"a", b"b", b"c")
        # The innocent who come back with the guilty one are not refused with it.
        kinds = await die_of_the_first(suspects)
        assert kinds == [ModelFaultError, type(None), type(None)]

    async def die_of_the_first(suspects: Suspects) -> list[type]:
        dead = asyncio.Event()

        async def work(image: bytes) -> None:
            async with at_work(suspects, image):
                if image == b"a":
                    await dead.wait()
                    raise ModelUnavailableError("dead")

        tasks = [asyncio.create_task(work(image)) for image in (b"a", b"b", b"c")]
        for _ in range(10):
            await asyncio.sleep(0)
        suspects.decoder_died()
        dead.set()
        return [type(each) for each in await asyncio.gather(*tasks, return_exceptions=True)]

    asyncio.run(run())


def test_others_do_not_wait_for_suspects() -> None:
    async def run() -> None:
        suspects = Suspects()
        await die_of(suspects, b"a")
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(at_work(suspects, b"a"))
            await asyncio.wait_for(caption(suspects, b"b"), LONG)

    asyncio.run(run())


def test_a_suspects_turn_comes_in_time_or_not_at_all() -> None:
    async def run() -> None:
        suspects = Suspects()
        await die_of(suspects, b"a", b"b")
        async with at_work(suspects, b"a"):
            with pytest.raises(DeadlineExceededError):
                async with suspects.alone(b"b", 0.05):
                    pass

    asyncio.run(run())
