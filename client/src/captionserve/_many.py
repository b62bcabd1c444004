"""The bookkeeping of `caption_many`, for both clients alike: it neither waits nor calls.

    waiting     an item that was pulled and is to be sent, at once or when its next attempt is due
    sent        an item that the present call has, and will answer
    finished    an outcome that is given out next, or, in order, when those before it have been

A call that ends leaves what it has not answered to the next one, which begins a little later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import grpc
from google.rpc import status_pb2

from captionserve._errors import FINAL_REASONS, CaptionError, from_status
from captionserve._framing import Framing
from captionserve._images import ImageInput
from captionserve._options import GenerationOptions
from captionserve._results import CaptionResult, from_proto
from captionserve._retry import Attempts, Backoff
from captionserve._transport import MAX_MESSAGE_BYTES, Connection, too_large
from captionserve.v1 import caption_pb2

DEFAULT_WINDOW = 16
# The server ends an item in time; this much later the client does not wait for it any more.
GRACE_SECONDS = 1.0
_LATE = "the deadline passed before the caption was complete"

# What says that calls to this service make no sense, not only this one.
_FATAL_CODES = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}

Step = Callable[[], None]
"""What a client does with its batch when something has happened."""


@dataclass(frozen=True)
class Outcome:
    """What has become of one image of `caption_many`; either `result` or `error` is there.

    Attributes:
        index: the image's place, from 0.
        result: its captions.
        error: a CaptionError, or what reading the image raised.
    """

    index: int
    result: CaptionResult | None
    error: Exception | None


@dataclass
class _Item:
    index: int
    request: caption_pb2.CaptionRequest
    attempts: Attempts
    due: float
    error: CaptionError | None = None

    @property
    def id(self) -> str:
        return str(self.index)


def checked_window(window: int) -> int:
    """Give the window back.

    Raises:
        ValueError: if it is not positive.
    """
    if window < 1:
        raise ValueError(f"window must be positive, is {window}")
    return window


class Batch:
    """The items of one `caption_many`."""

    def __init__(
        self,
        connection: Connection,
        options: GenerationOptions | None,
        framing: Framing,
        *,
        timeout: float | None,
        ordered: bool,
        bypass_cache: bool,
    ) -> None:
        """Begin empty; all but the client's connection are arguments of `caption_many`.

        Raises:
            ValueError: if the timeout is not a positive, finite number.
        """
        self._attempts = partial(connection.attempts, timeout)
        self._attempts()  # Raises before anything is pulled.
        self._request = partial(
            connection.request, options=options, framing=framing, bypass_cache=bypass_cache
        )
        self._ordered = ordered
        # By id.
        self._waiting: dict[str, _Item] = {}
        self._sent: dict[str, _Item] = {}
        # By index.
        self._finished: dict[int, Outcome] = {}
        self._pulled = 0
        self._given = 0
        self._all_pulled = False
        self._backoff = Backoff()
        self._next_call = 0.0
        self._window = caption_pb2.Window()
        self._draining = False

    @property
    def is_done(self) -> bool:
        """Whether all images have been pulled, and all outcomes given out."""
        return self._all_pulled and self._pulled == self._given

    @property
    def is_answered(self) -> bool:
        """Whether the present call has nothing left to answer."""
        return not self._sent

    @property
    def is_drained(self) -> bool:
        """Whether the present call shall end, and has nothing left to answer."""
        return self._draining and self.is_answered

    @property
    def wants_call(self) -> bool:
        """Whether there is something to send now, where there is no call."""
        now = time.monotonic()
        return self._next_call <= now and any(item.due <= now for item in self._waiting.values())

    def prepared(self, image: ImageInput) -> Step:
        """Read the next image, beside all else; the step that takes it in."""
        try:
            request = self._request(image)
        except Exception as error:  # Of many images it concerns this one alone.
            return partial(self._add_failed, error)
        return partial(self._add, request)

    def all_pulled(self) -> None:
        """There are no more images."""
        self._all_pulled = True

    def _add(self, request: caption_pb2.CaptionRequest) -> None:
        # Its time begins only now: the caller may have been away since it was read.
        item = _Item(self._pulled, request, self._attempts(), time.monotonic())
        self._waiting[item.id] = item
        self._pulled += 1

    def _add_failed(self, error: Exception) -> None:
        self._finish(self._pulled, error=error)
        self._pulled += 1

    def sendable(self) -> Iterator[caption_pb2.CaptionManyRequest]:
        """The items that shall be sent now; each is taken to be sent when it is given."""
        now = time.monotonic()
        for item in list(self._waiting.values()):
            if self._draining or len(self._sent) >= self._window.items:
                return
            if item.due > now:
                continue
            del self._waiting[item.id]
            message = caption_pb2.CaptionManyRequest(id=item.id, request=item.request)
            message.timeout.FromMilliseconds(max(1, int(1e3 * item.attempts.seconds_left)))
            most = min(self._window.message_bytes or MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES)
            if message.ByteSize() > most:  # It would break the call, and every item with it.
                self._finish(item.index, error=too_large(message.ByteSize(), most))
                continue
            self._sent[item.id] = item
            yield message

    def received(self, response: caption_pb2.CaptionManyResponse) -> None:
        """Take in what the server says."""
        event = response.WhichOneof("event")
        if event == "window":
            self._window = response.window
        elif event == "drain":
            self._draining = True
        elif event == "result":
            self._backoff.reset()
            item = self._sent.pop(response.result.id, None)
            if item is not None:  # Else nobody waits for it any more.
                self._answered(item, response.result)

    def call_ended(self, error: CaptionError | None) -> None:
        """The present call has ended; what it has not answered is for the next one.

        Args:
            error: what it has ended with, if not well.

        Raises:
            CaptionError: that error, if another call will not do better.
        """
        if error is not None and (error.code in _FATAL_CODES or error.reason in FINAL_REASONS):
            raise error
        asked = None if error is None else error.retry_after
        self._next_call = time.monotonic() + self._backoff.next_delay(asked)
        # The oldest first, as they were.
        unanswered = sorted((self._waiting | self._sent).values(), key=lambda item: item.index)
        self._waiting = {item.id: item for item in unanswered}
        self._sent = {}
        for item in unanswered:
            item.error = error or item.error
        self._window = caption_pb2.Window()
        self._draining = False

    def expire(self) -> None:
        """Finish the items whose time is up."""
        for items, grace in ((self._waiting, 0.0), (self._sent, GRACE_SECONDS)):
            for item in list(items.values()):
                if item.attempts.seconds_over >= grace:
                    del items[item.id]
                    late = CaptionError(
                        grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", _LATE
                    )
                    self._finish(item.index, error=item.error or late)

    def seconds_idle(self) -> float:
        """How long nothing happens by itself: nothing is due, and no item expires."""
        now = time.monotonic()
        times = [item.due for item in self._waiting.values()] + [self._next_call]
        left = [item.attempts.seconds_left for item in self._waiting.values()]
        left += [item.attempts.seconds_left + GRACE_SECONDS for item in self._sent.values()]
        left += [at - now for at in times if at > now]
        return min(left, default=GRACE_SECONDS)

    def outcomes(self) -> Iterator[Outcome]:
        """What can be given out now; each is taken to be given when it is."""
        while self._finished:
            index = self._given if self._ordered else next(iter(self._finished))
            if index not in self._finished:
                return
            self._given += 1
            yield self._finished.pop(index)

    def _answered(self, item: _Item, result: caption_pb2.ItemResult) -> None:
        if result.WhichOneof("outcome") == "response":
            self._finish(item.index, result=from_proto(result.response))
            return
        error = _error_of(result.error)
        try:
            delay = item.attempts.delay_after(error, overload=True)
        except CaptionError:
            self._finish(item.index, error=error)
            return
        item.due, item.error = time.monotonic() + delay, error
        self._waiting[item.id] = item

    def _finish(
        self, index: int, *, result: CaptionResult | None = None, error: Exception | None = None
    ) -> None:
        self._finished[index] = Outcome(index, result, error)


def _error_of(status: status_pb2.Status) -> CaptionError:
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return from_status(code, status.message or code.name, status)
