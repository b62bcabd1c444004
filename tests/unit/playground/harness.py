"""The page's server in this process, in front of a captioner that does what a test tells it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from captionserve import (
    BeamFate,
    Caption,
    CaptionError,
    CaptionResult,
    CaptionUpdate,
    Continuation,
    FinishReason,
    Framing,
    GenerationOptions,
)
from captionserve_server.playground.app import Bounds, playground_app
from captionserve_server.playground.security import own_names
from starlette.testclient import TestClient

ADDRESS = "http://127.0.0.1:9080"
HEADERS = {"Content-Type": "application/octet-stream"}
STEP = (
    Continuation(0, 4, "a", -0.5, -0.5, BeamFate.KEPT, 0),
    Continuation(0, 6, "", -2.5, -2.5, BeamFate.DROPPED, None),
)
RESULT = CaptionResult(
    captions=(
        Caption(
            text="a café",
            score=float("-inf"),
            token_ids=(4, 5),
            token_logprobs=(-0.5, -0.25),
            finish_reason=FinishReason.EOS,
            token_texts=("a", " café"),
            confidence=0.75,
            degenerate=False,
            attention=None,
        ),
    ),
    model_version=1,
    cached=False,
)


class Told:
    """A Captioner.

    Attributes:
        asked: what all calls were asked.
        error: what calls fail with after their first word.
        hold: whether calls never end.
        ended: calls that have ended, in whatever way.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, GenerationOptions, Framing]] = []
        self.error: CaptionError | None = None
        self.hold = False
        self.ended = 0

    async def captions(
        self, image: bytes, options: GenerationOptions, framing: Framing
    ) -> AsyncIterator[CaptionUpdate]:
        self.asked.append((image, options, framing))
        try:
            yield CaptionUpdate("a", (4,), None)
            if self.hold:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
            yield CaptionUpdate(" café", (5,), None, (STEP,))
            yield CaptionUpdate("", (), RESULT)
        finally:
            self.ended += 1

    async def facts(self) -> Mapping[str, Any]:
        if self.error is not None:
            raise self.error
        return {"where": "here", "models": []}


@contextmanager
def page(
    told: Told, bounds: Bounds | None = None, names: Iterable[str] = ()
) -> Iterator[TestClient]:
    """A visitor of the page's server, which listens on the loopback address."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Told]:
        yield told

    app = playground_app(opened, own_names("127.0.0.1", names), bounds or Bounds())
    with TestClient(app, base_url=ADDRESS) as client:
        yield client


def body(image: bytes = b"a picture", **asked: Any) -> bytes:
    return json.dumps({"options": {}, **asked}).encode() + b"\n" + image


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
