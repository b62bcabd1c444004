"""What keeps the decoder from doing the same work twice: a memory of answers, and shared work.

Only answers that would be the same the next time are remembered or shared; whoever calls decides
that. Errors are never remembered.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache
from captionserve.v1 import caption_pb2

from captionserve_server.core.errors import (
    CancelledError,
    DeadlineExceededError,
    ModelUnavailableError,
    OverloadedError,
)
from captionserve_server.core.framing import Framing
from captionserve_server.core.options import DecodingOptions
from captionserve_server.gateway.kserve import InputTensor

# What an entry takes beside the answer's own bytes: the key, the objects' headers, and its places
# in the three tables of an LRUCache. tests/unit/gateway/test_cache.py measures it.
ENTRY_OVERHEAD_BYTES = 640

# SHA-256 takes about 1 ms for so many bytes, or 3 ms without the processor's help: as long as the
# event loop may be held up.
_HASHED_IN_LOOP_BYTES = 2**20


async def image_digest(image: InputTensor) -> bytes:
    """What says which image it is, as 32 bytes.

    Args:
        image: the decoder's input.
    """
    spec, shape, raw = image

    def digest() -> bytes:
        digest = hashlib.sha256(repr((spec.name, shape)).encode())
        digest.update(raw)
        return digest.digest()

    if len(raw) <= _HASHED_IN_LOOP_BYTES:
        return digest()
    # hashlib lets other threads run meanwhile, the event loop's among them.
    return await asyncio.to_thread(digest)


def answer_key(
    image: bytes, framing: Framing, options: DecodingOptions, model_version: int, scope: str
) -> bytes:
    """What an answer depends on, and for whom it is remembered, as 32 bytes.

    Args:
        image: its digest.
        framing: what is asked of it.
        options: all of them, the checkpoint's defaults included.
        model_version: which one answers.
        scope: the same for all who may be given it.
    """
    # repr() is exact for numbers and quotes texts, so that different options stay different.
    return hashlib.sha256(image + repr((model_version, framing, options, scope)).encode()).digest()


class AnswerCache:
    """Remembers answers up to a number of bytes; the least recently used goes first."""

    def __init__(self, max_bytes: int) -> None:
        """Begin empty; with 0 bytes nothing is remembered."""
        self._answers: LRUCache[bytes, bytes] = LRUCache(max_bytes, getsizeof=_entry_bytes)

    @property
    def used_bytes(self) -> int:
        """The memory that the answers take, keys and tables included."""
        return int(self._answers.currsize)

    def get(self, key: bytes) -> caption_pb2.CaptionResponse | None:
        """The answer that was remembered, as a message of its own."""
        # Kept as bytes: their size is known exactly, and nobody can change a shared message.
        answer = self._answers.get(key)
        return None if answer is None else caption_pb2.CaptionResponse.FromString(answer)

    def put(self, key: bytes, response: caption_pb2.CaptionResponse) -> None:
        """Remember an answer, unless it alone is larger than the cache."""
        answer = response.SerializeToString()
        if _entry_bytes(answer) <= self._answers.maxsize:
            self._answers[key] = answer


def _entry_bytes(answer: bytes) -> int:
    return len(answer) + ENTRY_OVERHEAD_BYTES


Result = TypeVar("Result")


class _Work(Generic[Result]):
    """A task, and how many wait for it."""

    def __init__(self, task: asyncio.Task[Result]) -> None:
        self.task = task
        self.waiters = 0


class SharedWork(Generic[Result]):
    """Work in flight that several callers wait for.

    Work begins with the first who wants it and is cancelled when the last one who waits has gone.
    Who comes later begins it anew.
    """

    def __init__(self) -> None:
        """Begin with no work in flight."""
        self._in_flight: dict[Hashable, _Work[Result]] = {}

    async def run(
        self,
        key: Hashable,
        compute: Callable[[], Awaitable[Result]],
        seconds: float,
        *,
        admit: Callable[[], None],
    ) -> tuple[Result, bool]:
        """The result of the work that `key` names.

        Args:
            key: work of the same key is done once; an object() of its own shares with nobody.
            compute: does the work; bounds its own time.
            seconds: how long this caller waits.
            admit: asked before work is begun, and raises what refuses it; a task would cost more
                than a refusal may.

        Returns:
            The result, and whether the work had been begun by another.

        Raises:
            DeadlineExceededError: if the caller's time passes first.
            CaptionServeError: what `compute` or `admit` raised.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        while True:
            work = self._in_flight.get(key)
            joined = work is not None
            if work is None:
                admit()
                work = self._begin(key, compute)
            await self._wait(key, work, end - clock())
            try:
                return work.task.result(), joined
            except (DeadlineExceededError, CancelledError, OverloadedError):
                # The time of whoever began the work is not that of one who joined it late.
                if not joined or clock() >= end:
                    raise
            except asyncio.CancelledError as error:
                # Nobody cancels work that is waited for but gRPC, when its channel closes.
                raise ModelUnavailableError("the model server cannot answer now") from error

    def _begin(self, key: Hashable, compute: Callable[[], Awaitable[Result]]) -> _Work[Result]:
        async def run() -> Result:
            try:
                return await compute()
            finally:
                # Before the task is done, so that nobody joins work that has ended.
                if self._in_flight.get(key) is work:
                    del self._in_flight[key]

        work = self._in_flight[key] = _Work(asyncio.create_task(run()))
        # An error is told to those who wait; asyncio shall not complain when there are none left.
        work.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return work

    async def _wait(self, key: Hashable, work: _Work[Result], seconds: float) -> None:
        work.waiters += 1
        try:
            # Unlike wait_for(), wait() leaves the task alone when time is up.
            done, _ = await asyncio.wait((work.task,), timeout=seconds)
        finally:
            work.waiters -= 1
            if work.waiters == 0 and not work.task.done():
                # A task that has not run yet would not take itself out.
                if self._in_flight.get(key) is work:
                    del self._in_flight[key]
                work.task.cancel()
        if not done:
            raise DeadlineExceededError("the deadline passed before the caption was complete")
