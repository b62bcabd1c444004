"""How long a caption was in each stage, its turn in the gateway's queue included."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from captionserve_server.core.engine.timeline import STAGES as DECODER_STAGES
from captionserve_server.gateway.kserve import Outputs
from captionserve_server.triton import wire

TURN = "turn"
STAGES = {TURN: "Waiting in the gateway for a turn at the decoder."} | DECODER_STAGES
"""The stages in their order, and what each is."""

_FIRST_TOKEN = "first_step"


class Stage(NamedTuple):
    """A stage that a caption has passed.

    Attributes:
        name: of STAGES.
        begin: in seconds since 1970.
        seconds: how long it took.
    """

    name: str
    begin: float
    seconds: float


def turn_stage(seconds: float) -> Stage:
    """The turn that has just come, after so many seconds."""
    return Stage(TURN, time.time() - seconds, seconds)


def decoder_stages(outputs: Outputs) -> list[Stage]:
    """The stages that the decoder's last answer tells of.

    Raises:
        LookupError: if it tells of none.
    """
    begin, *seconds = outputs[wire.TIMES.name].values
    stages = []
    for name, taken in zip(DECODER_STAGES, seconds, strict=True):
        stages.append(Stage(name, begin, taken))
        begin += taken
    return stages


def first_token_seconds(stages: Sequence[Stage]) -> float:
    """From the beginning of the first stage to the first token."""
    first = next(stage for stage in stages if stage.name == _FIRST_TOKEN)
    return first.begin + first.seconds - stages[0].begin
