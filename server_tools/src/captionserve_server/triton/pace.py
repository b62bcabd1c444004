"""Doing now and then what costs too much to do each time."""

from __future__ import annotations

import time
from collections.abc import Callable

_SECONDS = 0.1


class Pace:
    """Keeps apart what need not be done each time."""

    def __init__(
        self, seconds: float = _SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Be due from the beginning, and then every so many seconds."""
        self._seconds = seconds
        self._clock = clock
        self._next = clock()

    def is_due(self) -> bool:
        """Whether it is time; if so, the time begins anew."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
