"""Values of ours among Triton's metrics.

Setting one sends Triton's process a message and waits for its answer, a third of a millisecond.
What changes with every step is shown at a Pace (pace.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import triton_python_backend_utils as pb_utils


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
