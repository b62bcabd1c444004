"""The bookkeeping of `caption_many`, for both clients alike: it neither waits nor calls.

    waiting     an item that was pulled and is to be sent, at once or when its next attempt is due
    sent        an item that the present call has, and will answer
    finished    an outcome that is given out next, or, in order, when those before it have been

A call that ends leaves what it has not answered to the next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
from google.rpc import status_pb2

from captionserve._errors import NOT_CAPTIONSERVE, CaptionError, from_status
from captionserve._results import CaptionResult, from_proto
from captionserve._retry import Attempts
from captionserve.v1 import caption_pb2

DEFAULT_WINDOW = 16
# The server ends an item in time; this much later the client does not wait for it any more.
_GRACE_SECONDS = 1.0
_LATE = "the deadline passed before the caption was complete"

# What says that calls to this service make no sense, not only this one.
_FATAL_CODES = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}


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


class Batch:
    """The items of one `caption_many`."""

    def __init__(self, window: int, *, ordered: bool) -> None:
        """Begin empty.

        Args:
            window: how many images may be pulled and not given out.
            ordered: whether outcomes are given out in the images' order.

        Raises:
            ValueError: if the window is not positive.
        """
        if window < 1:
            raise ValueError(f"window must be positive, is {window}")
        self._window = window
        self._ordered = ordered
        self._waiting: dict[int, _Item] = {}
        self._sent: dict[int, _Item] = {}
        self._finished: dict[int, Outcome] = {}
        self._pulled = 0
        self._given = 0
        self._server_window = 0
        self._draining = False

    @property
    def has_room(self) -> bool:
        """Whether another image may be pulled."""
        return self._pulled - self._given < self._window

    @property
    def is_done(self) -> bool:
        """Whether all that was pulled has been given out."""
        return self._pulled == self._given

    @property
    def is_due(self) -> bool:
        """Whether there is something to send now."""
        now = time.monotonic()
        return any(item.due <= now for item in self._waiting.values())

    @property
    def is_drained(self) -> bool:
        """Whether the present call shall end, and has nothing left to answer."""
        return self._draining and not self._sent

    def add(self, request: caption_pb2.CaptionRequest, attempts: Attempts) -> None:
        """Take in the next image."""
        item = _Item(self._pulled, request, attempts, time.monotonic())
        self._waiting[item.index] = item
        self._pulled += 1

    def add_failed(self, error: Exception) -> None:
        """Take in the next image, which could not be read."""
        self._finish(Outcome(self._pulled, None, error))
        self._pulled += 1

    def sendable(self) -> Iterator[caption_pb2.CaptionManyRequest]:
        """The items that shall be sent now; each is taken to be sent when it is given."""
        now = time.monotonic()
        for item in list(self._waiting.values()):
            if self._draining or len(self._sent) >= self._server_window:
                return
            if item.due > now:
                continue
            del self._waiting[item.index]
            self._sent[item.index] = item
            message = caption_pb2.CaptionManyRequest(id=str(item.index), request=item.request)
            message.timeout.FromMilliseconds(max(1, int(1e3 * item.attempts.seconds_left)))
            yield message

    def received(self, response: caption_pb2.CaptionManyResponse) -> None:
        """Take in what the server says."""
        event = response.WhichOneof("event")
        if event == "window":
            self._server_window = response.window.items
        elif event == "drain":
            self._draining = True
        elif event == "result":
            item = self._sent.pop(int(response.result.id), None)
            if item is not None:  # Else nobody waits for it any more.
                self._answered(item, response.result)

    def call_ended(self, error: CaptionError | None, delay: float) -> None:
        """The present call has ended; what it has not answered is for the next one.

        Args:
            error: what it has ended with, if not well.
            delay: seconds until the next one.

        Raises:
            CaptionError: that error, if another call will not do better.
        """
        if error is not None and (error.code in _FATAL_CODES or error.reason == NOT_CAPTIONSERVE):
            raise error
        due = time.monotonic() + delay
        for item in self._sent.values():
            item.due = due
        self._waiting |= self._sent
        for item in self._waiting.values():
            item.error = error or item.error
        # The oldest first, as they were.
        self._waiting = dict(sorted(self._waiting.items()))
        self._sent = {}
        self._server_window = 0
        self._draining = False

    def expire(self) -> None:
        """Finish the items whose time is up."""
        for items, grace in ((self._waiting, 0.0), (self._sent, _GRACE_SECONDS)):
            for item in list(items.values()):
                if item.attempts.seconds_over >= grace:
                    del items[item.index]
                    late = CaptionError(
                        grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", _LATE
                    )
                    self._finish(Outcome(item.index, None, item.error or late))

    def seconds_idle(self) -> float:
        """How long nothing happens by itself: no item is due, and none expires."""
        now = time.monotonic()
        times = [item.due for item in self._waiting.values() if item.due > now]
        left = [item.attempts.seconds_left for item in self._waiting.values()]
        left += [item.attempts.seconds_left + _GRACE_SECONDS for item in self._sent.values()]
        return max(0.0, min([due - now for due in times] + left, default=_GRACE_SECONDS))

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
            self._finish(Outcome(item.index, from_proto(result.response), None))
            return
        error = _error_of(result.error)
        try:
            delay = item.attempts.delay_after(error, overload=True)
        except CaptionError:
            self._finish(Outcome(item.index, None, error))
            return
        item.due, item.error = time.monotonic() + delay, error
        self._waiting[item.index] = item

    def _finish(self, outcome: Outcome) -> None:
        self._finished[outcome.index] = outcome


def _error_of(status: status_pb2.Status) -> CaptionError:
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return from_status(code, status.message or code.name, status)
