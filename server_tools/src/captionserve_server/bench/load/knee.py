"""Where the knee is: the highest rate that a service holds, if it holds all lower ones as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from captionserve_server.bench.load.figures import Verdict

# A sweep ends when the lowest rate that was missed is no more than this above the knee.
CLOSE = 1.05
# A service that holds nothing is not asked for ever less.
_MOST_HALVINGS = 4
# Nor one for ever more that answers whatever it is asked.
_MOST_DOUBLINGS = 12


@dataclass(frozen=True)
class Knee:
    """What is known of the knee.

    Attributes:
        rate: the highest rate that was held with all below it; None if the lowest was missed.
        missed: the lowest rate that was missed; None if all were held, and the knee is higher.
        certain: whether it was the service that missed that one, and not the generator.
    """

    rate: float | None
    missed: float | None
    certain: bool


def knee_of(verdicts: Iterable[tuple[float, Verdict]]) -> Knee:
    """The knee, from each rate's verdict; the rates may come in any order."""
    rate = None
    for tried, verdict in sorted(verdicts):
        if verdict is not Verdict.HELD:
            return Knee(rate, tried, certain=verdict is Verdict.MISSED)
        rate = tried
    return Knee(rate, None, certain=False)


def sweep(first: float, holds: Callable[[float], bool]) -> None:
    """Ask for rates until the knee is known closely: doubled until one is missed, then halfway.

    Args:
        first: the first rate; where it is missed already, lower ones are tried.
        holds: offers a rate, and says whether it was held.
    """
    held, missed = 0.0, float("inf")
    rate = first
    for _ in range(_MOST_DOUBLINGS):
        if not holds(rate):
            missed = rate
            break
        held, rate = rate, 2 * rate
    else:
        return
    for _ in range(_MOST_HALVINGS if not held else 0):
        rate = missed / 2
        if holds(rate):
            held = rate
            break
        missed = rate
    while held and missed > CLOSE * held:
        rate = _readable((held + missed) / 2)
        if not held < rate < missed:
            return
        if holds(rate):
            held = rate
        else:
            missed = rate


def _readable(rate: float) -> float:
    """In three digits."""
    return float(f"{rate:.3g}")
