"""When a call is tried again, decided without waiting or calling, for both clients alike.

A service that cannot answer now (UNAVAILABLE: it restarts, its model does, or nobody listens there
yet) is waited for until the caller's time is up. Captioning twice does no harm. What is refused for
overload is not tried again, for that would feed the overload. gRPC's own retries are off: they give
up after five attempts, and on every message of more than 256 KiB.
"""

from __future__ import annotations

import random
import threading
import time

import grpc

from captionserve._errors import FINAL_REASONS, OVERLOADED, CaptionError

# Where the server does not say how long to wait; doubled with each attempt, up to the most.
_FIRST_DELAY_SECONDS = 0.1
_MOST_DELAY_SECONDS = 2.0
# A delay is made longer by a random share up to this, so that callers do not come back together.
_JITTER = 0.25
# Attempts beside the first ones, of all calls of a client together.
_RETRIES_PER_SECOND = 20.0


class RetryBudget:
    """Keeps the repeated attempts of one client apart in time; shared by its calls and threads.

    It never refuses one: a call that may wait, waits a little longer.
    """

    def __init__(self) -> None:
        """Begin with nothing spent."""
        self._lock = threading.Lock()
        self._next = 0.0

    def earliest(self, wanted: float) -> float:
        """When an attempt may be made that is wanted then, by time.monotonic()."""
        with self._lock:
            granted = max(wanted, self._next)
            self._next = granted + 1 / _RETRIES_PER_SECOND
            return granted


class Backoff:
    """How long to wait between calls that fail one after the other."""

    def __init__(self) -> None:
        """Begin with the shortest delay."""
        self._delay = _FIRST_DELAY_SECONDS

    def reset(self) -> None:
        """A call has gone well."""
        self._delay = _FIRST_DELAY_SECONDS

    def next_delay(self, asked: float | None = None) -> float:
        """How long to wait, in seconds; the server may have asked for a time."""
        asked = self._delay if asked is None else asked
        self._delay = min(2 * self._delay, _MOST_DELAY_SECONDS)
        # Not randomness that anybody could make use of.
        return asked * (1 + random.uniform(0, _JITTER))


class Attempts:
    """The attempts of one call."""

    def __init__(self, budget: RetryBudget, seconds: float) -> None:
        """Begin the call.

        Args:
            budget: the client's.
            seconds: what the call may take, all attempts and waits together.
        """
        self._budget = budget
        self._deadline = time.monotonic() + seconds
        self._backoff = Backoff()

    @property
    def seconds_left(self) -> float:
        """What the next attempt may take; 0 if the time is up."""
        return max(0.0, self._deadline - time.monotonic())

    @property
    def seconds_over(self) -> float:
        """How long the time has been up; negative while it is not."""
        return time.monotonic() - self._deadline

    def delay_after(self, error: CaptionError, *, overload: bool = False) -> float:
        """How long to wait before the next attempt, in seconds.

        Args:
            error: what the last attempt has ended with.
            overload: whether one that was refused for overload is made again, as may be where a
                window bounds them.

        Raises:
            CaptionError: that error, if it is final or there is no time for another attempt.
        """
        passes = error.code is grpc.StatusCode.UNAVAILABLE and error.reason not in FINAL_REASONS
        if not passes and not (overload and error.reason == OVERLOADED):
            raise error
        now = time.monotonic()
        wanted = now + self._backoff.next_delay(error.retry_after)
        if wanted >= self._deadline or (at := self._budget.earliest(wanted)) >= self._deadline:
            raise error
        return at - now
