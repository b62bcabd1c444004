"""A model in this process behind the page: its words as they come, and visitors who leave."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest
from captionserve import CaptionError, CaptionUpdate, GenerationOptions
from captionserve_server.core.errors import CancelledError, ModelFaultError
from captionserve_server.local import LocalCaptioner, LocalUpdate
from captionserve_server.playground.captioners import Local

WAIT_SECONDS = 20.0


class OneWord:
    """A LocalCaptioner, and the stream that it gives: one word, and then what a test says."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.error = error
        self.told = False
        self.waited_for = threading.Event()
        self.closed = threading.Event()

    def caption_stream(self, *image_and_options: object, **framing: object) -> OneWord:
        self.asked = [*image_and_options, framing]
        return self

    def __next__(self) -> LocalUpdate:
        if not self.told:
            self.told = True
            return LocalUpdate("a", (4,), None)
        if self.error is not None:
            raise self.error
        self.waited_for.set()
        assert self.closed.wait(WAIT_SECONDS)
        raise CancelledError("the caller has gone")

    def close(self) -> None:
        self.closed.set()


def captions_of(captioner: OneWord) -> Any:
    local = Local(cast("LocalCaptioner", captioner), "here")
    return local.captions(b"a picture", GenerationOptions(num_beams=2), {"tiles": (1, 2)})


def test_a_visitor_who_leaves_is_not_captioned_for() -> None:
    captioner = OneWord()

    async def run() -> None:
        updates = captions_of(captioner)
        assert await anext(updates) == CaptionUpdate("a", (4,), None)
        waiting = asyncio.create_task(anext(updates))
        assert await asyncio.to_thread(captioner.waited_for.wait, WAIT_SECONDS)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert captioner.closed.is_set()

    asyncio.run(run())
    assert captioner.asked == [b"a picture", GenerationOptions(num_beams=2), {"tiles": (1, 2)}]


def test_a_failure_is_what_a_services_caller_gets_and_ends_the_stream() -> None:
    captioner = OneWord(error=ModelFaultError("the model failed"))

    async def run() -> None:
        updates = captions_of(captioner)
        await anext(updates)
        with pytest.raises(CaptionError) as raised:
            await anext(updates)
        assert (raised.value.reason, raised.value.message) == ("MODEL_FAULT", "the model failed")

    asyncio.run(run())
    assert captioner.closed.is_set()
