"""Long-lived threads that never die silently.

A thread whose body raises has a bug: nothing that waits for it would ever be answered, and nobody
would see why. So every thread that lives longer than a call is a Worker, which says what to do
then; and work that is handed over to threads goes to a WorkerPool, where each job says who is told
when it fails.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from captionserve_server.core.errors import ModelUnavailableError

OnDeath = Callable[[BaseException], None]
"""Told what ended a thread that should not have ended; called by that thread, as its last act."""


class Worker:
    """One thread with a body that returns when it is told to end, and never otherwise."""

    def __init__(self, name: str, body: Callable[[], None], on_death: OnDeath) -> None:
        """Start the thread.

        Args:
            name: of the thread.
            body: what it does; whoever made the worker tells it when to return.
            on_death: told of whatever the body raises. It must see to it that all who wait for the
                thread are answered.
        """
        self._body = body
        self._on_death = on_death
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> bool:
        """Wait until the thread has ended, for so long at most; whether it has.

        A thread that asks for its own end need not wait for it.
        """
        if self._thread is threading.current_thread():
            return False
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._body()
        except BaseException as error:  # Whatever it is, it must not pass unseen.
            self._on_death(error)


@dataclass(frozen=True)
class _Job:
    work: Callable[[], None]
    on_error: Callable[[Exception], None]


class WorkerPool:
    """Threads that take jobs from one queue, in their order."""

    def __init__(self, name: str, threads: int, on_death: OnDeath) -> None:
        """Start the threads.

        Args:
            name: of the threads.
            threads: how many.
            on_death: as a Worker's; called when telling of a failed job fails too.
        """
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        # Held while a job is queued, so that none can come behind the signs to end.
        self._closing = threading.Lock()
        self._workers = [Worker(f"{name}-{n}", self._run, on_death) for n in range(threads)]

    def submit(self, work: Callable[[], None], on_error: Callable[[Exception], None]) -> None:
        """Queue a job.

        Args:
            work: done by one of the threads.
            on_error: told, by that thread, what the work raised.

        Raises:
            ModelUnavailableError: if the pool is closing.
        """
        with self._closing:
            if self._closed:
                raise ModelUnavailableError("the service is shutting down")
            self._jobs.put(_Job(work, on_error))

    def close(self, seconds: float) -> bool:
        """Take no more jobs, do those that are queued, and end; whether that was done in time."""
        with self._closing:
            if not self._closed:
                self._closed = True
                for _ in self._workers:
                    self._jobs.put(None)
        deadline = time.monotonic() + seconds
        left = [worker.join(max(0.0, deadline - time.monotonic())) for worker in self._workers]
        return all(left)

    def _run(self) -> None:
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Do one job; whether there are more. What the job held goes with it, not with the next."""
        job = self._jobs.get()
        if job is None:
            return False
        try:
            job.work()
        except Exception as error:  # The job's own failure; the thread goes on with the next.
            job.on_error(error)
        return True
