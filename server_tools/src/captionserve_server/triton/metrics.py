"""Values of ours among Triton's metrics.

Setting one sends Triton's process a message and waits for its answer, a third of a millisecond.
What changes with every step is shown at a `Pace`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import triton_python_backend_utils as pb_utils

_SECONDS = 0.1


class Gauge:
    """A value among Triton's metrics that goes up and down."""

    def __init__(self, name: str, description: str, labels: Mapping[str, str]) -> None:
        """Add it to Triton's metrics."""
        # Triton wants the family to live as long as its metric.
        self._family = pb_utils.MetricFamily(
            name=name, description=description, kind=pb_utils.MetricFamily.GAUGE
        )
        self._metric = self._family.Metric(labels=dict(labels))

    def set(self, value: float) -> None:
        """Show the present value."""
        self._metric.set(value)


class Counter:
    """A value among Triton's metrics that only goes up."""

    def __init__(self, name: str, description: str, labels: Mapping[str, str]) -> None:
        """Add it to Triton's metrics, at zero."""
        self._family = pb_utils.MetricFamily(
            name=name, description=description, kind=pb_utils.MetricFamily.COUNTER
        )
        self._metric = self._family.Metric(labels=dict(labels))
        self._shown = 0.0

    def raise_to(self, total: float) -> None:
        """Go up to `total`."""
        self._metric.increment(total - self._shown)
        self._shown = total


class Pace:
    """Keeps apart what need not be done each time."""

    def __init__(
        self, seconds: float = _SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Be due from the beginning, and then every so many seconds."""
        self._seconds = seconds
        self._clock = clock
        self._next = clock()

    def is_due(self) -> bool:
        """Whether it is time; if so, the time begins anew."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + self._seconds
        return True
