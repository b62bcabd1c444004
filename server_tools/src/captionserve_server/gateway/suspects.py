"""Images that may have ended the decoder, so that one of them cannot end it again and again.

Whatever is in work when the decoder dies is suspect until it is captioned. Suspects are tried again
one after the other, beside all other images: when the decoder dies a second time in a row with one
of them in work, it was alone among the suspects, and is refused from then on.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from cachetools import TTLCache

from captionserve_server.core.errors import (
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
)

# Who is refused may be innocent, where something else killed the decoder twice.
_REFUSED_SECONDS = 600.0
_MOST_REFUSED = 1024

_REFUSED = "the model server has died twice while it worked on this image"


class Suspects:
    """Knows images by their digests."""

    def __init__(self) -> None:
        """Begin with no suspect."""
        self._in_work: collections.Counter[bytes] = collections.Counter()
        self._suspects: set[bytes] = set()
        self._refused: TTLCache[bytes, bool] = TTLCache(_MOST_REFUSED, _REFUSED_SECONDS)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def alone(self, digest: bytes, seconds: float) -> AsyncIterator[None]:
        """No other suspect is worked on while the block runs, if the image is one.

        Args:
            digest: the image's.
            seconds: how long it may wait for that.

        Raises:
            DeadlineExceededError: if its turn does not come in time.
        """
        if digest not in self._suspects:
            yield
            return
        await self._wait_for_turn(seconds)
        try:
            yield
        finally:
            self._turn.release()

    @contextmanager
    def in_work(self, digest: bytes) -> Iterator[None]:
        """The decoder works on an image while the block runs.

        Raises:
            ModelFaultError: if the image is refused, or the decoder has just died of it.
        """
        self._check(digest)
        self._in_work[digest] += 1
        try:
            yield
            self._suspects.discard(digest)
        except ModelUnavailableError:
            self._check(digest)
            raise
        finally:
            self._in_work[digest] -= 1
            if not self._in_work[digest]:
                del self._in_work[digest]

    def decoder_died(self) -> None:
        """The decoder has died; to be called while what was in work still is."""
        in_work = set(self._in_work)
        for digest in in_work & self._suspects:
            self._refused[digest] = True
        self._suspects = in_work.difference(self._refused)

    def _check(self, digest: bytes) -> None:
        if digest in self._refused:
            raise ModelFaultError(_REFUSED)

    async def _wait_for_turn(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._turn.acquire(), seconds)
        except asyncio.TimeoutError as error:
            raise DeadlineExceededError(
                "the deadline passed before the caption was begun"
            ) from error
