"""The thread that drives the caption engine.

Other threads hand encoded images in at any time; between two decoding steps the engine takes all of
them. When the step model fails, every caption under way fails with it and the engine goes on empty.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future

from captionserve_server.core.engine import CaptionEngine, CaptionTask, Outcome
from captionserve_server.core.errors import (
    CaptionServeError,
    ModelFaultError,
    ModelUnavailableError,
)
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import DecodedCaption
from captionserve_server.core.step_model import Float32Array

Captions = list[DecodedCaption]


class EngineThread:
    """Runs a CaptionEngine for many submitters."""

    def __init__(self, engine: CaptionEngine, log_error: Callable[[str], None]) -> None:
        """Start the thread; `log_error` is told of failures of the step model."""
        self._engine = engine
        self._log_error = log_error
        self._arrived: list[tuple[CaptionTask, Future[Captions]]] = []
        self._futures: dict[object, Future[Captions]] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="caption-engine", daemon=True)
        self._thread.start()

    def submit(self, states: Float32Array, options: DecodingOptions) -> Future[Captions]:
        """Queue one image, [image tokens, encoder width]; the future gets its captions."""
        future: Future[Captions] = Future()
        task = CaptionTask(key=object(), states=states, options=options)
        with self._wake:
            if self._closing:
                raise ModelUnavailableError("the server is shutting down")
            self._arrived.append((task, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """End the thread after its present step; captions under way fail."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._take_arrived():
            try:
                ended = self._engine.step()
            except Exception as error:  # The model failed, not a request: nobody else may hang.
                self._fail_all(error)
                continue
            for key, outcome in ended.items():
                self._end(self._futures.pop(key), outcome)
        self._fail_all(ModelUnavailableError("the server is shutting down"))

    def _take_arrived(self) -> bool:
        """Wait until there is something to decode; False when closing."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._arrived or not self._engine.idle)
            arrived, self._arrived = self._arrived, []
            for task, future in arrived:
                self._futures[task.key] = future
                self._engine.submit(task)
            return not self._closing

    def _end(self, future: Future[Captions], outcome: Outcome) -> None:
        if isinstance(outcome, ModelFaultError):
            self._log_error(f"a caption failed: {outcome.message}")
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _fail_all(self, error: Exception) -> None:
        if self._futures:
            self._log_error(
                f"{len(self._futures)} captions failed: {type(error).__name__}: {error}"
            )
        # The model that failed may be unable to free slots as well; the captions fail all the same.
        with contextlib.suppress(CaptionServeError):
            self._engine.abandon_all()
        futures, self._futures = self._futures, {}
        for future in futures.values():
            future.set_exception(error)
