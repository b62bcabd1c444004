"""What the decoder does, among Triton's metrics.

Setting a metric sends Triton's process a message and waits for its answer, a third of a
millisecond. So figures are counted here and shown at a pace.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import triton_python_backend_utils as pb_utils

from captionserve_server.core.engine.scheduler import Scheduler
from captionserve_server.runtime.graph_step_model import GraphStepModel

_PACE_SECONDS = 0.1


class DecoderMetrics:
    """Counts what one decoder does; shown by the engine's thread."""

    def __init__(
        self, version: int, slots: int, scheduler: Scheduler, step_model: GraphStepModel
    ) -> None:
        """Begin at zero.

        Args:
            version: of the model.
            slots: requests that can be decoded at once.
            scheduler: whose requests are counted.
            step_model: whose memory and graphs are.
        """
        self._scheduler = scheduler
        self._lock = threading.Lock()
        self._steps = 0
        self._step_seconds = 0.0
        self._image_seconds = 0.0
        self._next_show = time.monotonic()
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
        self._shown = [
            *(_Shown(name, family.GAUGE, *what, labels) for name, what in gauges.items()),
            *(_Shown(name, family.COUNTER, *what, labels) for name, what in counters.items()),
        ]
        self._show()

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
        """Count a step that took so long; all figures are shown once the scheduler is idle."""
        self._steps += 1
        self._step_seconds += seconds
        now = time.monotonic()
        if self._scheduler.idle or now >= self._next_show:
            self._next_show = now + _PACE_SECONDS
            self._show()

    def _show(self) -> None:
        for each in self._shown:
            each.show()


class _Shown:
    """One value among Triton's metrics."""

    def __init__(
        self,
        name: str,
        kind: object,
        description: str,
        value: Callable[[], float],
        labels: Mapping[str, str],
    ) -> None:
        # Triton wants the family to live as long as its metric.
        self._family = pb_utils.MetricFamily(
            name=f"captionserve_{name}", description=description, kind=kind
        )
        self._metric = self._family.Metric(labels=dict(labels))
        self._counts = kind == pb_utils.MetricFamily.COUNTER
        self._value = value
        self._last = 0.0

    def show(self) -> None:
        """Show the present value, where it is another than the last."""
        value = self._value()
        if value == self._last:
            return
        if self._counts:
            self._metric.increment(value - self._last)
        else:
            self._metric.set(value)
        self._last = value
