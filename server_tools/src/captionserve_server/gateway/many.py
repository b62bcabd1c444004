"""CaptionMany: many images over one call, each answered once, as it is finished."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from captionserve.v1 import caption_pb2
from google.protobuf.message import DecodeError

from captionserve_server.core.errors import CaptionServeError, InvalidRequestError
from captionserve_server.gateway.conversion import Message, decoder_message
from captionserve_server.gateway.status import google_status

_log = logging.getLogger(__name__)

MAX_ID_CHARACTERS = 128
_ADVICE = caption_pb2.CaptionManyResponse(drain=caption_pb2.Drain())


@dataclass(frozen=True)
class Item:
    """One image of a call.

    Attributes:
        id: the caller's name for it; empty where it has none that could be told.
        asked: what is asked of it, or why nothing can be.
        size: bytes that its message had.
        seconds: how long it may take; None where the caller does not say.
    """

    id: str
    asked: Message | CaptionServeError
    size: int
    seconds: float | None = None

    @classmethod
    def of(cls, raw: bytes) -> Item:
        """Read a CaptionManyRequest, of which nothing is held."""
        try:
            item = caption_pb2.CaptionManyRequest.FromString(raw)
        except DecodeError:
            return cls("", InvalidRequestError("the item is not a valid message"), len(raw))
        if not 0 < len(item.id) <= MAX_ID_CHARACTERS:
            text = f"an item needs an id of up to {MAX_ID_CHARACTERS} characters"
            return cls("", InvalidRequestError(text), len(raw))
        seconds = item.timeout.ToMilliseconds() / 1e3 if item.HasField("timeout") else None
        try:
            return cls(item.id, decoder_message(item.request), len(raw), seconds)
        except Exception as error:  # Of whatever kind: it is this item's alone.
            return cls(item.id, _own(error), len(raw), seconds)

    def message(self) -> Message:
        """What is asked; CaptionServeError if that is nothing that can be answered."""
        if isinstance(self.asked, CaptionServeError):
            raise self.asked
        return self.asked


Answer = Callable[[Item], Awaitable[caption_pb2.CaptionResponse]]
"""Captions an item; raises CaptionServeError."""


class ManyCaptions:
    """One CaptionMany call.

    One task reads items, and each item has a task of its own; what they say goes through a queue to
    whoever iterates over `responses`. The reader holds a place of the window for each item that is
    not answered, so that the client is held up by gRPC's flow control, and nothing piles up.
    """

    def __init__(
        self,
        requests: AsyncIterator[bytes],
        answer: Answer,
        *,
        window: int,
        message_bytes: int,
        draining: asyncio.Event,
        seconds: float,
    ) -> None:
        """Prepare.

        Args:
            requests: the call's messages.
            answer: captions an item.
            window: how many items may be unanswered.
            message_bytes: largest item, as the client is told.
            draining: set when the service ends.
            seconds: how long the call may last, before the client is sent to a new one.
        """
        self._requests = requests
        self._answer = answer
        self._window = caption_pb2.Window(items=window, message_bytes=message_bytes)
        self._draining = draining
        self._seconds = seconds
        self._places = asyncio.Semaphore(window)
        self._said: asyncio.Queue[caption_pb2.CaptionManyResponse | None] = asyncio.Queue()
        self._items: set[asyncio.Task[None]] = set()

    async def responses(self) -> AsyncIterator[caption_pb2.CaptionManyResponse]:
        """What the client is told, until all that was read is answered."""
        yield caption_pb2.CaptionManyResponse(window=self._window)
        reading = asyncio.create_task(self._read())
        advising = asyncio.create_task(self._advise())
        try:
            while (said := await self._said.get()) is not None:
                yield said
                # Not before: the answers of a client that does not read them would pile up.
                if said.HasField("result"):
                    self._places.release()
            reading.result()
        finally:
            # Also when the client has gone: whoever still works for it stops.
            for task in (reading, advising, *self._items):
                task.cancel()
            await asyncio.gather(reading, advising, *self._items, return_exceptions=True)

    async def _read(self) -> None:
        """Begin every item that comes, until no more come; then say the end behind the last one."""
        try:
            while True:
                await self._places.acquire()
                try:
                    item = Item.of(await self._requests.__anext__())
                except StopAsyncIteration:
                    break
                serving = asyncio.create_task(self._serve(item))
                self._items.add(serving)
                serving.add_done_callback(self._items.discard)
            await asyncio.gather(*self._items, return_exceptions=True)
        finally:
            self._said.put_nowait(None)

    async def _serve(self, item: Item) -> None:
        result = caption_pb2.ItemResult(id=item.id)
        try:
            result.response.CopyFrom(await self._answer(item))
        except Exception as error:
            result.error.CopyFrom(google_status(_own(error)))
        self._said.put_nowait(caption_pb2.CaptionManyResponse(result=result))

    async def _advise(self) -> None:
        """Send the client elsewhere when the service ends, or the call has lasted long enough."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._draining.wait(), self._seconds)
        self._said.put_nowait(_ADVICE)


def _own(error: Exception) -> CaptionServeError:
    """The error, where it is one of ours; any other is logged, and shows nothing of itself."""
    if isinstance(error, CaptionServeError):
        return error
    _log.error("an item failed", exc_info=error)
    return CaptionServeError("the server failed")
