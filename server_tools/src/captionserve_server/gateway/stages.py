"""The stages of a caption, its turn in the gateway's queue included."""

from __future__ import annotations

import time
from collections.abc import Sequence

from captionserve_server.core.engine.timeline import STAGES as DECODER_STAGES
from captionserve_server.core.engine.timeline import Stage

_TURN = "turn"
STAGES = {_TURN: "Waiting in the gateway for a turn at the decoder."} | DECODER_STAGES
"""The stages in their order, and what each is."""

_FIRST_TOKEN = "first_step"


def turn_stage(seconds: float) -> Stage:
    """The turn that has just come, after so many seconds."""
    return Stage(_TURN, time.time() - seconds, seconds)


def first_token_seconds(stages: Sequence[Stage]) -> float:
    """From the beginning of the first stage to the first token."""
    first = next(stage for stage in stages if stage.name == _FIRST_TOKEN)
    return first.begin + first.seconds - stages[0].begin
