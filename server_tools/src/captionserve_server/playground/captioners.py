"""Whom the page asks: a service, or a model in this process, behind one interface."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Protocol

from captionserve import (
    AsyncCaptionClient,
    CaptionUpdate,
    Framing,
    GenerationOptions,
)

if TYPE_CHECKING:
    from captionserve_server.local import LocalCaptioner

_FACTS_SECONDS = 5.0


class Captioner(Protocol):
    """Captions one image at a time; may be asked for several at once."""

    def captions(
        self, image: bytes, options: GenerationOptions, framing: Framing
    ) -> AsyncIterator[CaptionUpdate]:
        """What becomes known of an image's captions, at last the result.

        Raises:
            CaptionError: why there are none.
        """

    async def facts(self) -> Mapping[str, Any]:
        """What answers, as JSON values; CaptionError if nothing does."""


class Served:
    """A service."""

    def __init__(self, client: AsyncCaptionClient, where: str) -> None:
        """Ask through a client.

        Args:
            client: of the service; whoever made it closes it.
            where: how the service is called on the page.
        """
        self._client = client
        self._where = where

    async def captions(
        self, image: bytes, options: GenerationOptions, framing: Framing
    ) -> AsyncIterator[CaptionUpdate]:
        """As Captioner has it."""
        async with aclosing(self._client.caption_stream(image, options, **framing)) as updates:
            async for update in updates:
                yield update

    async def facts(self) -> Mapping[str, Any]:
        """As Captioner has it."""
        served = dataclasses.asdict(await self._client.models(timeout=_FACTS_SECONDS))
        # Options are told with their types by themselves.
        del served["options"]
        return {"where": self._where, **served}


class Local:
    """A model in this process."""

    def __init__(self, captioner: LocalCaptioner, where: str) -> None:
        """Ask a captioner.

        Args:
            captioner: whoever made it closes it.
            where: how it is called on the page.
        """
        self._captioner = captioner
        self._where = where

    async def captions(
        self, image: bytes, options: GenerationOptions, framing: Framing
    ) -> AsyncIterator[CaptionUpdate]:
        """As Captioner has it."""
        # Brings ONNX Runtime along, which takes a while and a service needs none of.
        from captionserve_server.bulk.local_outcomes import as_told, errors_as_called

        with errors_as_called():
            # A stream that is not waited for any more closes itself.
            updates = await asyncio.to_thread(
                self._captioner.caption_stream, image, options, **framing
            )
            with closing(updates):
                while (update := await asyncio.to_thread(next, updates, None)) is not None:
                    yield as_told(update)

    async def facts(self) -> Mapping[str, Any]:
        """As Captioner has it."""
        model = {"is_default": True, **self._captioner.model()}
        return {"where": self._where, "models": [model]}
