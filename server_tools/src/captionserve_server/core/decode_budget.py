"""How much memory all images together may take while they are decoded.

A few bytes may unpack to many: a file of 111 KB to 50 megapixels. What an image will take is known
from its header; it is reserved before anything is decoded, and an image waits where there is no
room, in the order in which images came.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from captionserve_server.core.errors import CancelledError, DeadlineExceededError

DEFAULT_DECODE_MEGABYTES = 512
BYTES_PER_MEGABYTE = 1 << 20
# How often one that waits asks whether its caller has gone; nobody tells it.
_ASK_SECONDS = 0.1

Reserve = Callable[[int], AbstractContextManager[None]]
"""Takes so many bytes, waits for them, and gives them back at the end of the block."""


def without_limit(size: int) -> AbstractContextManager[None]:
    """A Reserve that has all bytes there are."""
    return nullcontext()


class DecodeBudget:
    """Bytes that images share; several threads may use it at once."""

    def __init__(self, size: int) -> None:
        """Begin with all bytes free.

        Args:
            size: in bytes. An image that takes more is decoded alone.
        """
        self._size = size
        self._free = size
        self._changed = threading.Condition()
        # Who waits, first come first: else a large image might wait for ever.
        self._queue: deque[object] = deque()

    @property
    def waiting(self) -> int:
        """How many images wait."""
        return len(self._queue)

    @contextmanager
    def reserved(
        self,
        size: int,
        has_gone: Callable[[], bool] = lambda: False,
        deadline: float = float("inf"),
    ) -> Iterator[None]:
        """Wait for bytes, and give them back at the end of the block.

        Args:
            size: in bytes.
            has_gone: whether the caller has given up.
            deadline: until when the caller waits, by time.monotonic().

        Raises:
            CancelledError: if the caller has given up.
            DeadlineExceededError: if the deadline has passed.
        """
        size = min(size, self._size)
        self._take(size, has_gone, deadline)
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()

    def _take(self, size: int, has_gone: Callable[[], bool], deadline: float) -> None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or self._free < size:
                    if has_gone():
                        raise CancelledError("the caller has gone")
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise DeadlineExceededError("the deadline passed")
                    self._changed.wait(min(left, _ASK_SECONDS))
                self._free -= size
            finally:
                self._queue.remove(ticket)
                # The next in the queue may have room, too.
                self._changed.notify_all()
