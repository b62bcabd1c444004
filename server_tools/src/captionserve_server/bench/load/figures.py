"""What became of the calls at one rate, and whether the service held it.

A call's time runs from when it was due. Were it counted from when it was sent, a generator that is
held up, by the service's own load for one, would leave out just the calls that waited longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

ANSWERED = "OK"
REFUSED = "RESOURCE_EXHAUSTED"

# Of the largest latency that is allowed. What a generator is late by counts as the service's time,
# and more than this cannot be left to it.
_LATE_SHARE = 0.1


@dataclass(frozen=True)
class Call:
    """What became of a call.

    Attributes:
        due: when it had to be made, in seconds after the beginning.
        sent: when it was.
        ended: when its answer or its error was there.
        code: name of its gRPC status code.
        cached: whether it was answered from memory.
    """

    due: float
    sent: float
    ended: float
    code: str
    cached: bool = False


class Verdict(str, Enum):
    """Whether a rate was held."""

    HELD = "held"
    MISSED = "missed"
    GENERATOR_LATE = "generator late"
    """It was not held, and who is to blame for that cannot be told."""


@dataclass(frozen=True)
class Bounds:
    """What a service has to keep at a rate that it holds.

    Attributes:
        p99_seconds: largest 99th percentile of its answers' latencies.
        answered_share: least share of the calls that is answered.
    """

    p99_seconds: float
    answered_share: float = 0.95


@dataclass(frozen=True)
class Figures:
    """A rate as it was measured; latencies in milliseconds, of what there was none of None.

    Attributes:
        rate: calls a second that were meant to come.
        calls: how many were due.
        due_per_second: that is, a second.
        answered_per_second: those of them that were answered, a second.
        refused_per_second: that were refused for overload.
        codes: calls by status code.
        cached: calls answered from memory.
        p50_ms: median latency of the answers.
        p95_ms: 95th percentile.
        p99_ms: 99th percentile.
        refused_p50_ms: median time until a refusal.
        late_p99_ms: how late calls were sent, 99th percentile.
        late_most_ms: the latest of them.
    """

    rate: float
    calls: int
    due_per_second: float
    answered_per_second: float
    refused_per_second: float
    codes: dict[str, int]
    cached: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    refused_p50_ms: float | None
    late_p99_ms: float | None
    late_most_ms: float | None

    def verdict(self, bounds: Bounds) -> Verdict:
        """Whether the rate was held; if it was, a late generator has only made that harder."""
        most_ms = 1e3 * bounds.p99_seconds
        answered = self.answered_per_second >= bounds.answered_share * self.due_per_second
        if answered and self.p99_ms is not None and self.p99_ms <= most_ms:
            return Verdict.HELD
        if self.late_p99_ms is not None and self.late_p99_ms > _LATE_SHARE * most_ms:
            return Verdict.GENERATOR_LATE
        return Verdict.MISSED


def figures_of(rate: float, calls: Sequence[Call], *, begin: float, end: float) -> Figures:
    """The figures of the calls that were due from `begin` to `end`, whenever they ended.

    Args:
        rate: calls a second that were meant to come.
        calls: all that were made.
        begin: seconds after the beginning of the load; until then the service only fills.
        end: likewise.
    """
    counted = [call for call in calls if begin <= call.due < end]
    codes = Counter(call.code for call in counted)
    answered = [call.ended - call.due for call in counted if call.code == ANSWERED]
    refused = [call.ended - call.due for call in counted if call.code == REFUSED]
    late = [call.sent - call.due for call in counted]
    p50, p95, p99 = _percentiles_ms(answered, 50, 95, 99)
    (refused_p50,) = _percentiles_ms(refused, 50)
    late_p99, late_most = _percentiles_ms(late, 99, 100)
    seconds = end - begin
    return Figures(
        rate=rate,
        calls=len(counted),
        due_per_second=len(counted) / seconds,
        answered_per_second=len(answered) / seconds,
        refused_per_second=len(refused) / seconds,
        codes=dict(sorted(codes.items())),
        cached=sum(call.cached for call in counted),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        refused_p50_ms=refused_p50,
        late_p99_ms=late_p99,
        late_most_ms=late_most,
    )


def _percentiles_ms(seconds: Sequence[float], *percents: float) -> list[float | None]:
    """Percentiles in milliseconds, each one of the values: none is made up between two."""
    if not seconds:
        return [None] * len(percents)
    found = np.percentile(seconds, percents, method="inverted_cdf")
    return [1e3 * float(value) for value in found]
