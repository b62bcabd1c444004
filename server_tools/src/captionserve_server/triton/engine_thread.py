"""The thread that drives the caption engine.

Other threads hand encoded images in at any time; between two decoding steps the engine takes all of
them in, and lets go of those whose callers have gone. When the step model fails, every caption
under way fails with it and the engine goes on empty.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field

from captionserve_server.core.engine import CaptionEngine, CaptionTask
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    ModelUnavailableError,
)
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import DecodedCaption
from captionserve_server.core.step_model import Float32Array

Captions = list[DecodedCaption]


@dataclass(frozen=True)
class _Submission:
    task: CaptionTask
    is_abandoned: Callable[[], bool]
    future: Future[Captions] = field(default_factory=Future)


class EngineThread:
    """Runs a CaptionEngine for many submitters."""

    def __init__(self, engine: CaptionEngine, log_error: Callable[[str], None]) -> None:
        """Start the thread; `log_error` is told of failures of the model."""
        self._engine = engine
        self._log_error = log_error
        self._arrived: list[_Submission] = []
        self._under_way: dict[Hashable, _Submission] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="caption-engine", daemon=True)
        self._thread.start()

    def submit(
        self, states: Float32Array, options: DecodingOptions, is_abandoned: Callable[[], bool]
    ) -> Future[Captions]:
        """Queue one image.

        Args:
            states: [image tokens, encoder width].
            options: how to decode.
            is_abandoned: asked between steps whether the caller has gone.

        Returns:
            a future of the captions; it fails with CancelledError when the caller has gone.

        Raises:
            ModelUnavailableError: if the thread is closing.
        """
        submission = _Submission(CaptionTask(object(), states, options), is_abandoned)
        with self._wake:
            if self._closing:
                raise ModelUnavailableError("the server is shutting down")
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
            try:
                self._drop_abandoned()
                self._step()
            except Exception as error:  # The model failed, not a request: nobody else may hang.
                self._log_error(f"decoding failed: {type(error).__name__}: {error}")
                self._fail_all(error)
        self._fail_all(ModelUnavailableError("the server is shutting down"))

    def _take_arrived(self) -> bool:
        """Wait until there is something to decode; False when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._arrived or not self._engine.idle)
            arrived, self._arrived = self._arrived, []
            for submission in arrived:
                self._under_way[submission.task.key] = submission
                self._engine.submit(submission.task)
            return not self._closing

    def _drop_abandoned(self) -> None:
        for key, submission in list(self._under_way.items()):
            if submission.is_abandoned():
                del self._under_way[key]
                submission.future.set_exception(CancelledError("the caller has gone"))
                self._engine.abandon(key)

    def _step(self) -> None:
        for key, outcome in self._engine.step().items():
            future = self._under_way.pop(key).future
            if isinstance(outcome, CaptionServeError):
                self._log_error(f"a caption failed: {outcome.message}")
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
