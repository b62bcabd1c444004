"""Who waits for an answer, and whether they still do.

Asking Triton whether a caller has gone takes a message to its process and back: 0.2 ms, or several
while the cores are busy, for each caller. A thread of its own asks, so that no decoding step waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import triton_python_backend_utils as pb_utils

from captionserve_server.core.engine.worker import OnDeath, Worker
from captionserve_server.triton.pb import Request, Response, error_response, log_error

_INTERVAL_SECONDS = 0.2


class Caller:
    """Who sent a request and waits for its answer.

    Attributes:
        deadline: when the answer must be there, by time.monotonic().
        request_id: as the caller named the request; empty where that is no text.
        has_gone: whether the caller has cancelled, or its connection's deadline has passed, as far
            as is known.
    """

    def __init__(self, request: Request) -> None:
        """Take the answer's way back and the time allowed from the request."""
        self._sender = request.get_response_sender()
        # Microseconds; 0 where the request has no limit of its own.
        allowed = request.timeout()
        self.deadline = time.monotonic() + allowed / 1e6 if allowed else float("inf")
        self.request_id = _text_of_id(request)
        self.has_gone = False
        self._answered = False
        self._asking = threading.Lock()

    def look(self) -> bool:
        """Ask whether the caller has gone; whether to ask again."""
        # Triton forgets a request with its last response and must not be asked about it then.
        with self._asking:
            if not self._answered and not self.has_gone:
                self.has_gone = bool(self._sender.is_cancelled())
            return not (self._answered or self.has_gone)

    @property
    def answered(self) -> bool:
        """Whether the last response was sent, or was tried to be."""
        return self._answered

    def send(self, part: Response) -> None:
        """Send one of several responses."""
        self._sender.send(part)

    def finish(self, answer: Response | None) -> None:
        """Send the last response, or just the end; a second one is not sent."""
        with self._asking:
            if self._answered:
                return
            self._answered = True
            final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            if answer is None:
                self._sender.send(flags=final)
            else:
                self._sender.send(answer, flags=final)

    def fail(self, error: Exception) -> None:
        """Send an error as the last response; one that cannot be sent is this caller's loss."""
        try:
            self.finish(error_response(error))
        except Exception as unsent:
            log_error(f"an error could not be sent: {type(unsent).__name__}: {unsent}")


def _text_of_id(request: Request) -> str:
    try:
        return str(request.request_id())
    except UnicodeDecodeError:  # Over HTTP Triton takes any bytes.
        return ""


class CallerWatch:
    """The thread that looks after callers until they have their answer or have gone."""

    def __init__(
        self, on_death: OnDeath, on_gone: Callable[[Caller], None] = lambda caller: None
    ) -> None:
        """Start the thread.

        Args:
            on_death: told of what should not have ended the thread.
            on_gone: told, by the thread, of each caller that has gone.
        """
        self._on_gone = on_gone
        self._callers: list[Caller] = []
        self._closing = False
        self._wake = threading.Condition()
        self._worker = Worker("caller-watch", self._run, on_death)

    def add(self, caller: Caller) -> None:
        """Look after one more."""
        with self._wake:
            self._callers.append(caller)
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        """Take it that the caller of a request has gone; one that is not here is ignored."""
        if not request_id:  # Of all whose request has no name, it would be anybody.
            return
        with self._wake:
            for caller in self._callers:
                if caller.request_id == request_id:
                    caller.has_gone = True

    def close(self, seconds: float) -> None:
        """End the thread, which may take so long."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._worker.join(seconds)

    def _run(self) -> None:
        while self._wait():
            with self._wake:
                callers = list(self._callers)
            done = {caller for caller in callers if not self._waits(caller)}
            with self._wake:
                self._callers = [caller for caller in self._callers if caller not in done]

    def _waits(self, caller: Caller) -> bool:
        try:
            waits = caller.look()
            if caller.has_gone:
                self._on_gone(caller)
            return waits
        except Exception as error:  # Whoever cannot be asked is taken to wait until the deadline.
            log_error(f"asking for a caller: {type(error).__name__}: {error}")
            return False

    def _wait(self) -> bool:
        """Wait until there are callers and it is time; False when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._callers)
            self._wake.wait_for(lambda: self._closing, _INTERVAL_SECONDS)
            return not self._closing
