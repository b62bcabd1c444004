"""When calls come, and what each asks for: decided before any of them is made."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrival:
    """A call to be made.

    Attributes:
        due: seconds after the beginning.
        image: which one it asks for.
        repeated: whether it may be answered from memory; else it has to be computed.
    """

    due: float
    image: int
    repeated: bool


def poisson_arrivals(
    rate: float, seconds: float, *, images: int, cached_share: float, seed: int
) -> list[Arrival]:
    """Calls of many callers who know nothing of each other, in their order.

    The same seed gives the same pattern at every rate, only faster, so that two rates differ in
    nothing else.

    Args:
        rate: calls a second, on average.
        seconds: for how long they come.
        images: how many there are to ask for.
        cached_share: how likely a call is a repeated one.
        seed: of the times and of the choices.
    """
    draws = random.Random(seed)
    arrivals: list[Arrival] = []
    due = draws.expovariate(1.0) / rate
    while due < seconds:
        repeated = draws.random() < cached_share
        arrivals.append(Arrival(due, draws.randrange(images), repeated))
        due += draws.expovariate(1.0) / rate
    return arrivals
