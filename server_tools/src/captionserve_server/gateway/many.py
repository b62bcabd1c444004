"""CaptionMany: many images over one call, each answered once, as it is finished."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from captionserve.v1 import caption_pb2
from google.protobuf.message import DecodeError

from captionserve_server.core.errors import CaptionServeError, InvalidRequestError
from captionserve_server.gateway.status import google_status

_log = logging.getLogger(__name__)

MAX_ID_CHARACTERS = 128
_ADVICE = caption_pb2.CaptionManyResponse(drain=caption_pb2.Drain())

Answer = Callable[[caption_pb2.CaptionManyRequest, int], Awaitable[caption_pb2.CaptionResponse]]
"""Captions an item, whose message had so many bytes; raises CaptionServeError."""


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
                    raw = await self._requests.__anext__()
                except StopAsyncIteration:
                    break
                item = asyncio.create_task(self._serve(raw))
                self._items.add(item)
                item.add_done_callback(self._items.discard)
            await asyncio.gather(*self._items, return_exceptions=True)
        finally:
            self._said.put_nowait(None)

    async def _serve(self, raw: bytes) -> None:
        result = caption_pb2.ItemResult()
        try:
            item = _item(raw)
            result.id = item.id
            result.response.CopyFrom(await self._answer(item, len(raw)))
        except CaptionServeError as error:
            result.error.CopyFrom(google_status(error))
        except Exception:
            _log.exception("an item failed")
            result.error.CopyFrom(google_status(CaptionServeError("the server failed")))
        self._said.put_nowait(caption_pb2.CaptionManyResponse(result=result))

    async def _advise(self) -> None:
        """Send the client elsewhere when the service ends, or the call has lasted long enough."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._draining.wait(), self._seconds)
        self._said.put_nowait(_ADVICE)


def _item(raw: bytes) -> caption_pb2.CaptionManyRequest:
    try:
        item = caption_pb2.CaptionManyRequest.FromString(raw)
    except DecodeError as error:
        raise InvalidRequestError("the item is not a valid message") from error
    if not 0 < len(item.id) <= MAX_ID_CHARACTERS:
        raise InvalidRequestError(f"an item needs an id of up to {MAX_ID_CHARACTERS} characters")
    return item
