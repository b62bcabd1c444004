"""The thread that drives the caption engine.

Other threads hand preprocessed images in at any time; between two decoding steps the engine queues
them, lets go of those whose callers have gone or have no time left, and tells those who listen
which words have become certain. When the step model fails, every caption under way fails with it
and the engine goes on empty.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.engine.scheduler import CaptionEngine, CaptionTask
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    DeadlineExceededError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.core.step_model import UInt8Array

Captions = list[DecodedCaption]


class Audience(Protocol):
    """Who waits for a caption; asked and told by the engine's thread, so it must not block."""

    @property
    def has_gone(self) -> bool:
        """Whether nobody waits any more."""

    @property
    def deadline(self) -> float:
        """When the caption must be there, by time.monotonic()."""

    def hear(self, certain_tokens: Callable[[], tuple[int, ...]]) -> None:
        """Called after each step; the argument gives the tokens that are certain by now."""


@dataclass(frozen=True)
class _Submission:
    task: CaptionTask
    audience: Audience
    future: Future[Captions] = field(default_factory=Future)


class EngineThread:
    """Runs a CaptionEngine for many submitters."""

    def __init__(
        self,
        engine: CaptionEngine,
        log_error: Callable[[str], None],
        after_step: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """Start the thread.

        Args:
            engine: what it drives.
            log_error: told of failures of the model.
            after_step: told how long each round took, from waking to the last answer handed over.
        """
        self._engine = engine
        self._log_error = log_error
        self._after_step = after_step
        self._arrived: list[_Submission] = []
        self._under_way: dict[Hashable, _Submission] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="caption-engine", daemon=True)
        self._thread.start()

    def submit(self, pixels: UInt8Array, plan: CaptionPlan, audience: Audience) -> Future[Captions]:
        """Queue one image.

        Args:
            pixels: uint8 [3, height, width].
            plan: how to decode.
            audience: who waits.

        Returns:
            a future of the captions; it fails with CancelledError when the audience has gone, with
            DeadlineExceededError when its deadline has passed, unless the plan allows partial
            captions and there are some.

        Raises:
            ModelUnavailableError: if the thread is closing.
        """
        submission = _Submission(CaptionTask(object(), pixels, plan), audience)
        with self._wake:
            if self._closing:
                raise ModelUnavailableError("the captioner is shutting down")
            self._arrived.append(submission)
            self._wake.notify()
        return submission.future

    def close(self) -> None:
        """End the thread after its present step; captions under way fail."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._take_arrived():
            begin = time.perf_counter()
            try:
                self._let_go()
                self._step()
            except Exception as error:  # The model failed, not a request: nobody else may hang.
                self._log_error(f"decoding failed: {type(error).__name__}: {error}")
                self._fail_all(error)
            self._after_step(time.perf_counter() - begin)
        self._fail_all(ModelUnavailableError("the captioner is shutting down"))

    def _take_arrived(self) -> bool:
        """Wait until there is something to decode; False when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._arrived or not self._engine.idle)
            arrived, self._arrived = self._arrived, []
            for submission in arrived:
                self._under_way[submission.task.key] = submission
                self._engine.submit(submission.task)
            return not self._closing

    def _let_go(self) -> None:
        """Part with those who have gone or have no time left."""
        now = time.monotonic()
        for key, submission in list(self._under_way.items()):
            if submission.audience.has_gone:
                outcome: Captions | CaptionServeError = CancelledError("the caller has gone")
            elif submission.audience.deadline <= now:
                outcome = self._at_deadline(submission)
            else:
                continue
            self._engine.abandon(key)
            self._end(key, outcome)

    def _at_deadline(self, submission: _Submission) -> Captions | CaptionServeError:
        late = DeadlineExceededError("the deadline passed before the caption was complete")
        if not submission.task.plan.options.allow_partial:
            return late
        return self._engine.best_so_far(submission.task.key) or late

    def _step(self) -> None:
        for key, outcome in self._engine.step().items():
            if isinstance(outcome, ModelFaultError):
                self._log_error(f"a caption failed: {outcome.message}")
            self._end(key, outcome)
        for key, submission in self._under_way.items():
            submission.audience.hear(partial(self._engine.certain_tokens, key))

    def _end(self, key: Hashable, outcome: Captions | CaptionServeError) -> None:
        future = self._under_way.pop(key).future
        if isinstance(outcome, CaptionServeError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _fail_all(self, error: Exception) -> None:
        # The model that failed may be unable to free slots as well; the captions fail all the same.
        with contextlib.suppress(CaptionServeError):
            self._engine.abandon_all()
        failed, self._under_way = self._under_way, {}
        for submission in failed.values():
            submission.future.set_exception(error)
