"""The thread that drives the scheduler.

Other threads hand prepared images in at any time. Between two decoding steps the thread queues
them, lets go of those whose callers have gone or have no time left, and tells those who listen
how far their captions are. Whatever fails ends the captions it concerns; the thread itself
ends only when it is closed, or by a bug, and then everybody who waits is told so.

An image and parts of it that are captioned beside it are one question: to the scheduler they are
requests like any, but their caller hears once, when all have ended, or when the first has failed,
with which the others end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.engine.scheduler import Outcome, Request, Scheduler
from captionserve_server.core.engine.timeline import Timeline
from captionserve_server.core.engine.worker import OnDeath, Worker
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.core.history import HistoryStep
from captionserve_server.core.step_model import UInt8Array
from captionserve_server.core.updates import Progress

Answer = list[list[DecodedCaption]] | CaptionServeError
"""The captions of a whole image and of each of its parts, best first; or why there are none."""


class Caller(Protocol):
    """Who waits for captions; asked and told by the engine's thread, so it must not block."""

    @property
    def has_gone(self) -> bool:
        """Whether nobody waits any more."""

    @property
    def deadline(self) -> float:
        """When the caption must be there, by time.monotonic()."""

    def hear(self, progress: Progress) -> None:
        """Called after each step, until the whole image's captions are there.

        The argument, good for this call only, says how far the whole image's caption is.
        """

    def end(self, answer: Answer) -> None:
        """Called exactly once, with the captions or with why there are none.

        That is CancelledError when the caller has gone, DeadlineExceededError when the deadline has
        passed, unless the plan allows partial captions and there are some of the whole image. Parts
        of which there are none then have none.
        """


@dataclass(slots=True)  # Made for every request at every step, and frozen ones take thrice as long.
class _Running:
    """A running request's Progress."""

    scheduler: Scheduler
    key: Hashable

    def certain_tokens(self) -> tuple[int, ...]:
        return self.scheduler.certain_tokens(self.key)

    def history(self) -> tuple[HistoryStep, ...]:
        return self.scheduler.history(self.key)


@dataclass(eq=False)
class _Question:
    """What one caller waits for.

    Attributes:
        plan: how to decode.
        caller: who waits.
        keys: of the requests; the whole image's, then the parts'.
        captions: of those that have ended.
    """

    plan: CaptionPlan
    caller: Caller
    keys: tuple[Hashable, ...]
    captions: dict[Hashable, list[DecodedCaption]] = field(default_factory=dict)


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
        self._arrived: list[tuple[list[Request], Caller]] = []
        # By the key of each request that has not ended.
        self._under_way: dict[Hashable, _Question] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._worker = Worker("engine", self._run, self._died)

    def submit(
        self,
        views: Sequence[UInt8Array],
        plan: CaptionPlan,
        caller: Caller,
        timeline: Timeline | None = None,
    ) -> None:
        """Queue one image and its parts; the caller is told what becomes of them.

        Args:
            views: uint8 [3, height, width] each; the whole image, then the parts.
            plan: how to decode all of them.
            caller: who waits.
            timeline: where the stages of the whole image are taken down, if anybody wants to know.

        Raises:
            ModelUnavailableError: if the thread has ended or is closing; the caller is not told.
        """
        with self._wake:
            if self._closing:
                raise ModelUnavailableError("the captioner is shutting down")
            whole, *parts = views
            requests = [Request(object(), whole, plan, timeline or Timeline())]
            requests += [Request(object(), part, plan) for part in parts]
            self._arrived.append((requests, caller))
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
            for request in self._enter_arrived():
                self._scheduler.submit(request)
            return not self._closing

    def _enter_arrived(self) -> list[Request]:
        """Take what has arrived into the table; its requests."""
        arrived, self._arrived = self._arrived, []
        for requests, caller in arrived:
            keys = tuple(request.key for request in requests)
            question = _Question(requests[0].plan, caller, keys)
            self._under_way |= dict.fromkeys(keys, question)
        return [request for requests, _ in arrived for request in requests]

    def _let_go(self) -> None:
        """Part with those who have gone or have no time left."""
        now = time.monotonic()
        for key, question in list(self._under_way.items()):
            if key not in self._under_way:  # It ended with another of its question.
                continue
            if question.caller.has_gone:
                self._abandon(key, CancelledError("the caller has gone"))
            elif question.caller.deadline <= now:
                self._abandon(key, self._at_deadline(key, question))

    def _at_deadline(self, key: Hashable, question: _Question) -> Outcome:
        late = DeadlineExceededError("the deadline passed before the caption was complete")
        if not question.plan.options.allow_partial:
            return late
        try:
            found = self._scheduler.best_so_far(key)
        except Exception as error:  # Of this caption's search.
            return self._fault(error)
        return late if not found and key == question.keys[0] else found

    def _step(self) -> None:
        for key, outcome in self._scheduler.step().items():
            if isinstance(outcome, ModelFaultError):
                self._log(outcome.__cause__ or outcome)
            self._end(key, outcome)
        for key, question in list(self._under_way.items()):
            if key != question.keys[0]:
                continue
            try:
                question.caller.hear(_Running(self._scheduler, key))
            except Exception as error:  # Of this caption's search, or of whoever listens.
                self._abandon(key, self._fault(error))

    def _abandon(self, key: Hashable, outcome: Outcome) -> None:
        self._scheduler.abandon(key)
        self._end(key, outcome)

    def _end(self, key: Hashable, outcome: Outcome) -> None:
        """End a request, and with the last or the first that failed its question.

        Taken from the table first, so that no caller is told twice.
        """
        question = self._under_way.pop(key, None)
        if question is None:  # It ended in the same step as another of its question that failed.
            return
        if not isinstance(outcome, CaptionServeError):
            question.captions[key] = outcome
            if len(question.captions) == len(question.keys):
                self._tell(question.caller, [question.captions[each] for each in question.keys])
            return
        for other in question.keys:
            if self._under_way.pop(other, None) is not None:
                self._scheduler.abandon(other)
        self._tell(question.caller, outcome)

    def _tell(self, caller: Caller, answer: Answer) -> None:
        try:
            caller.end(answer)
        except Exception as error:  # An answer that cannot be handed over is lost alone.
            self._log(error)

    def _end_all(self) -> None:
        with self._wake:
            self._enter_arrived()
        questions = dict.fromkeys(self._under_way.values())
        self._under_way = {}
        for question in questions:
            self._tell(question.caller, ModelUnavailableError("the captioner is shutting down"))

    def _fault(self, error: Exception) -> ModelFaultError:
        self._log(error)
        return ModelFaultError("the model failed")

    def _log(self, error: BaseException) -> None:
        self._log_error(f"{type(error).__name__}: {error}")
