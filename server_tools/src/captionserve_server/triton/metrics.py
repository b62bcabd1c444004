"""What the decoder does, among Triton's metrics.

Setting a metric sends Triton's process a message and waits for its answer, a third of a
millisecond. So the engine's thread only takes the figures down; a thread shows them, at a pace.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import triton_python_backend_utils as pb_utils

from captionserve_server.core.engine.scheduler import Scheduler
from captionserve_server.core.engine.worker import OnDeath, Worker
from captionserve_server.runtime.graph_step_model import GraphStepModel
from captionserve_server.triton.pb import log_error

_PACE_SECONDS = 0.1
# At the end a thread that is showing may take this long.
_CLOSE_SECONDS = 5.0


class DecoderMetrics:
    """Counts what one decoder does, and the thread that shows it."""

    def __init__(
        self,
        version: int,
        slots: int,
        scheduler: Scheduler,
        step_model: GraphStepModel,
        on_death: OnDeath,
    ) -> None:
        """Begin at zero, and start the thread.

        Args:
            version: of the model.
            slots: requests that can be decoded at once.
            scheduler: whose requests are counted.
            step_model: whose memory and graphs are.
            on_death: told of what should not have ended the thread.
        """
        self._lock = threading.Lock()
        self._steps = 0
        self._step_seconds = 0.0
        self._image_seconds = 0.0
        self._counted = threading.Event()
        self._closing = threading.Event()
        graphs = step_model.graphs
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "slots": ("Captions that can be decoded at once.", lambda: slots),
            "slots_used": ("Captions being decoded.", lambda: scheduler.running),
            "waiting_captions": ("Captions without a slot.", lambda: scheduler.waiting),
            "kv_cache_bytes": (
                "Memory of the keys and values in use.",
                lambda: step_model.bytes_used,
            ),
        }
        counters: dict[str, tuple[str, Callable[[], float]]] = {
            "engine_steps_total": ("Decoding steps.", lambda: self._steps),
            "engine_seconds_total": ("Time spent decoding.", lambda: self._step_seconds),
            "image_seconds_total": (
                "Time spent decoding and resizing images, over all threads.",
                lambda: self._image_seconds,
            ),
            "prefill_seconds_total": ("Time in the prefill graph.", lambda: graphs.prefill.seconds),
            "step_seconds_total": ("Time in the step graph.", lambda: graphs.step.seconds),
            "top_seconds_total": ("Time in the top graph.", lambda: graphs.top.seconds),
        }
        labels = {"version": str(version)}
        family = pb_utils.MetricFamily
        self._values = [value for _, value in (*gauges.values(), *counters.values())]
        self._shown = [
            *(_Shown(name, family.GAUGE, text, labels) for name, (text, _) in gauges.items()),
            *(_Shown(name, family.COUNTER, text, labels) for name, (text, _) in counters.items()),
        ]
        self._figures = self._take_down()
        self._show()
        self._worker = Worker("metrics", self._run, on_death)

    @contextmanager
    def image(self) -> Iterator[None]:
        """Count the time that an image takes."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._image_seconds += time.perf_counter() - begin

    def count_step(self, seconds: float) -> None:
        """Count a step that took so long, and take down all figures; by the engine's thread."""
        self._steps += 1
        self._step_seconds += seconds
        self._figures = self._take_down()
        self._counted.set()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._counted.set()
        self._worker.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while self._counted.wait() and not self._closing.wait(_PACE_SECONDS):
            self._counted.clear()
            try:
                self._show()
            except Exception as error:  # Figures are worth nobody's caption.
                log_error(f"{type(error).__name__}: {error}")

    def _take_down(self) -> list[float]:
        """All figures of one moment, none of which changes while the engine's thread is here."""
        return [value() for value in self._values]

    def _show(self) -> None:
        for each, figure in zip(self._shown, self._figures, strict=True):
            each.show(figure)


class _Shown:
    """One value among Triton's metrics."""

    def __init__(
        self,
        name: str,
        kind: object,
        description: str,
        labels: Mapping[str, str],
    ) -> None:
        # Triton wants the family to live as long as its metric.
        self._family = pb_utils.MetricFamily(
            name=f"captionserve_{name}", description=description, kind=kind
        )
        self._metric = self._family.Metric(labels=dict(labels))
        self._counts = kind == pb_utils.MetricFamily.COUNTER
        self._last = 0.0

    def show(self, value: float) -> None:
        """Show a value, where it is another than the last."""
        if value == self._last:
            return
        if self._counts:
            self._metric.increment(value - self._last)
        else:
            self._metric.set(value)
        self._last = value
