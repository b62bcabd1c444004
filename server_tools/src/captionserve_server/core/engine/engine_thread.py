"""The thread that drives the scheduler.

Other threads hand prepared images in at any time. Between two decoding steps the thread queues
them, lets go of those whose callers have gone or have no time left, and tells those who listen
which words have become certain. Whatever fails ends the captions it concerns; the thread itself
ends only when it is closed, or by a bug, and then everybody who waits is told so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from captionserve_server.core.captions import CaptionPlan
from captionserve_server.core.engine.scheduler import Outcome, Request, Scheduler
from captionserve_server.core.engine.timeline import Timeline
from captionserve_server.core.engine.worker import OnDeath, Worker
from captionserve_server.core.errors import (
    CancelledError,
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.core.step_model import UInt8Array


class Caller(Protocol):
    """Who waits for a caption; asked and told by the engine's thread, so it must not block."""

    @property
    def has_gone(self) -> bool:
        """Whether nobody waits any more."""

    @property
    def deadline(self) -> float:
        """When the caption must be there, by time.monotonic()."""

    def hear(self, certain_tokens: Callable[[], tuple[int, ...]]) -> None:
        """Called after each step; the argument gives the tokens that are certain by now."""

    def end(self, outcome: Outcome) -> None:
        """Called exactly once, with the captions or with why there are none.

        That is CancelledError when the caller has gone, DeadlineExceededError when the deadline has
        passed, unless the plan allows partial captions and there are some.
        """


@dataclass(frozen=True)
class _UnderWay:
    plan: CaptionPlan
    caller: Caller


class EngineThread:
    """Runs a Scheduler for many callers."""

    def __init__(
        self,
        scheduler: Scheduler,
        log_error: Callable[[str], None],
        *,
        after_step: Callable[[float], None] = lambda seconds: None,
        on_death: OnDeath = lambda error: None,
    ) -> None:
        """Start the thread.

        Args:
            scheduler: what it drives.
            log_error: told of failures that are nobody's request.
            after_step: told how long each round took, from waking to the last answer handed over.
            on_death: told, when a bug has ended the thread, after everybody who waits was told
                ModelUnavailableError; later captions are refused with it.
        """
        self._scheduler = scheduler
        self._log_error = log_error
        self._after_step = after_step
        self._on_death = on_death
        self._arrived: list[tuple[Request, Caller]] = []
        self._under_way: dict[Hashable, _UnderWay] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._worker = Worker("engine", self._run, self._died)

    def submit(
        self,
        pixels: UInt8Array,
        plan: CaptionPlan,
        caller: Caller,
        timeline: Timeline | None = None,
    ) -> None:
        """Queue one image; the caller is told what becomes of it.

        Args:
            pixels: uint8 [3, height, width].
            plan: how to decode.
            caller: who waits.
            timeline: where its stages are taken down, if anybody wants to know.

        Raises:
            ModelUnavailableError: if the thread has ended or is closing; the caller is not told.
        """
        with self._wake:
            if self._closing:
                raise ModelUnavailableError("the captioner is shutting down")
            request = Request(object(), pixels, plan, timeline or Timeline())
            self._arrived.append((request, caller))
            self._wake.notify()

    def close(self, seconds: float) -> bool:
        """End the thread after its present step; captions under way fail.

        Args:
            seconds: how long that may take.

        Returns:
            whether it has ended.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        return self._worker.join(seconds)

    def _run(self) -> None:
        while self._take_arrived():
            begin = time.perf_counter()
            self._let_go()
            self._step()
            try:
                self._after_step(time.perf_counter() - begin)
            except Exception as error:  # Figures are not worth a caption.
                self._log(error)
        self._end_all()

    def _died(self, error: BaseException) -> None:
        with self._wake:
            self._closing = True
        self._log_error(f"the engine's thread ended by {type(error).__name__}: {error}")
        self._end_all()
        self._on_death(error)

    def _take_arrived(self) -> bool:
        """Wait until there is something to decode; False when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._arrived or not self._scheduler.idle)
            for request, caller in self._arrived:
                self._under_way[request.key] = _UnderWay(request.plan, caller)
                self._scheduler.submit(request)
            self._arrived = []
            return not self._closing

    def _let_go(self) -> None:
        """Part with those who have gone or have no time left."""
        now = time.monotonic()
        for key, each in list(self._under_way.items()):
            if each.caller.has_gone:
                self._abandon(key, CancelledError("the caller has gone"))
            elif each.caller.deadline <= now:
                self._abandon(key, self._at_deadline(key, each.plan))

    def _at_deadline(self, key: Hashable, plan: CaptionPlan) -> Outcome:
        late = DeadlineExceededError("the deadline passed before the caption was complete")
        if not plan.options.allow_partial:
            return late
        try:
            return self._scheduler.best_so_far(key) or late
        except Exception as error:  # Of this caption's search.
            return self._fault(error)

    def _step(self) -> None:
        for key, outcome in self._scheduler.step().items():
            if isinstance(outcome, ModelFaultError):
                self._log(outcome.__cause__ or outcome)
            self._end(key, outcome)
        for key, each in list(self._under_way.items()):
            try:
                each.caller.hear(partial(self._scheduler.certain_tokens, key))
            except Exception as error:  # Of this caption's search, or of whoever listens.
                self._abandon(key, self._fault(error))

    def _abandon(self, key: Hashable, outcome: Outcome) -> None:
        self._scheduler.abandon(key)
        self._end(key, outcome)

    def _end(self, key: Hashable, outcome: Outcome) -> None:
        """Tell a caller; taken from the table first, so that nobody is told twice."""
        caller = self._under_way.pop(key).caller
        try:
            caller.end(outcome)
        except Exception as error:  # An answer that cannot be handed over is lost alone.
            self._log(error)

    def _end_all(self) -> None:
        with self._wake:
            for request, caller in self._arrived:
                self._under_way[request.key] = _UnderWay(request.plan, caller)
            self._arrived = []
        for key in list(self._under_way):
            self._end(key, ModelUnavailableError("the captioner is shutting down"))

    def _fault(self, error: Exception) -> ModelFaultError:
        self._log(error)
        return ModelFaultError("the model failed")

    def _log(self, error: BaseException) -> None:
        self._log_error(f"{type(error).__name__}: {error}")
