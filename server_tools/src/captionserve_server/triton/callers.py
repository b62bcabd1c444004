"""Who waits for an answer, and whether they still do.

Asking Triton whether a caller has gone takes a message to its process and back: 0.2 ms, or several
while the cores are busy, for each caller. A thread of its own asks, so that no decoding step waits.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import triton_python_backend_utils as pb_utils

from captionserve_server.triton.pb import Request

_INTERVAL_SECONDS = 0.2


class Caller:
    """Who sent a request and waits for its answer.

    Attributes:
        deadline: when the answer must be there, by time.monotonic().
        request_id: as the caller named the request.
        has_gone: whether the caller has cancelled, or its connection's deadline has passed, as far
            as is known.
    """

    def __init__(self, request: Request) -> None:
        """Take the answer's way back and the time allowed from the request."""
        self._sender = request.get_response_sender()
        # Microseconds; 0 where the request has no limit of its own.
        allowed = request.timeout()
        self.deadline = time.monotonic() + allowed / 1e6 if allowed else float("inf")
        self.request_id = str(request.request_id())
        self.has_gone = False
        self._answered = False
        self._asking = threading.Lock()

    @property
    def waits(self) -> bool:
        """Whether the caller is there and has time left."""
        return not self.has_gone and time.monotonic() < self.deadline

    def look(self) -> bool:
        """Ask whether the caller has gone; whether to ask again."""
        # Triton forgets a request with its last response and must not be asked about it then.
        with self._asking:
            if not self._answered:
                self.has_gone = bool(self._sender.is_cancelled())
            return not (self._answered or self.has_gone)

    def send(self, part: Any) -> None:
        """Send one of several responses."""
        self._sender.send(part)

    def finish(self, answer: Any) -> None:
        """Send the last response."""
        with self._asking:
            self._answered = True
            self._sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class CallerWatch:
    """The thread that looks after callers until they have their answer or have gone."""

    def __init__(self) -> None:
        """Start the thread."""
        self._callers: list[Caller] = []
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="caller-watch", daemon=True)
        self._thread.start()

    def add(self, caller: Caller) -> None:
        """Look after one more."""
        with self._wake:
            self._callers.append(caller)
            self._wake.notify()

    def close(self) -> None:
        """End the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            with self._wake:
                callers, self._callers = self._callers, []
            waiting = [caller for caller in callers if caller.look()]
            with self._wake:
                self._callers += waiting

    def _wait(self) -> bool:
        """Wait until there are callers and it is time; False when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._callers)
            self._wake.wait_for(lambda: self._closing, _INTERVAL_SECONDS)
            return not self._closing
