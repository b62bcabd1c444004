"""What a decoding step costs with each option at its limits, as a multiple of plain beams.

    python -m captionserve_server.bench.step_cost MODEL_REPOSITORY

Every row of the table is a caption of the most beams at the most length that they may have, alone
and four at once. The cases take turns, so that a machine that gets slower does so for all of them;
a figure is the median of its steps' times divided by that of plain beam search.
"""

from __future__ import annotations

import statistics
import string
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from captionserve_server.core.captions import CaptionPlan
from captionserve_server.core.engine.scheduler import Request, Scheduler, SchedulerLimits
from captionserve_server.core.options import MAX_NUM_BEAMS, MAX_ROWS_TIMES_LENGTH
from captionserve_server.core.search import Vocabulary
from captionserve_server.core.step_model import Float32Array, UInt8Array
from captionserve_server.local.model_folder import LoadedModel, load_model
from captionserve_server.runtime.graph_step_model import GraphStepModel

PLAIN = "plain beams"
_ROUNDS = 3
# Of one letter, and of a hundred that few tokenizers have a token for.
_SHORT_WORDS = string.ascii_letters + string.digits
_LONG_WORDS = [(first + second) * 50 for first in "qzxjkvwb" for second in "fpgymdhc"]


def cases(max_positions: int) -> dict[str, dict[str, Any]]:
    """Options by name, each at its limits for a decoder of so many positions."""
    length = min(MAX_ROWS_TIMES_LENGTH // MAX_NUM_BEAMS, max_positions)
    beams: dict[str, Any] = {
        "num_beams": MAX_NUM_BEAMS,
        "max_length": length,
        "min_length": length,
    }
    # A word takes a token for the space before it and one for the letter, at most.
    short_words = list(_SHORT_WORDS[: (length - 1) // 2])
    return {
        PLAIN: beams,
        "force_words, many": beams | {"force_words": short_words},
        "force_words, long": beams | {"force_words": [("qz" * length)[: min(100, length - 2)]]},
        "bad_words": beams | {"bad_words": _LONG_WORDS},
        "bad_words that nearly match": beams
        | {"prefix": "q" * (length // 2), "bad_words": ["q" * n + "z" for n in range(1, 65)]},
        "suppress_tokens": beams | {"suppress_tokens": list(range(1, 257))},
        "repetition_penalty": beams | {"repetition_penalty": 1.2},
        "no_repeat_ngram_size": beams | {"no_repeat_ngram_size": length // 2},
        "num_beam_groups": beams | {"num_beam_groups": MAX_NUM_BEAMS, "diversity_penalty": 1.0},
        "output_attentions": beams | {"output_attentions": True},
        "do_sample": {
            "do_sample": True,
            "num_return_sequences": MAX_NUM_BEAMS,
            "max_length": length,
            "min_length": length,
            "top_k": 0,
        },
    }


class _Encoder:
    """States that are random, so that captions do not end."""

    def __init__(self, model: LoadedModel) -> None:
        geometry = model.bundle.geometry
        self._shape = (geometry.image_tokens, geometry.encoder_width)

    def encode(self, pixels: UInt8Array) -> Float32Array:
        states = np.random.default_rng(0).normal(size=(len(pixels), *self._shape))
        return states.astype(np.float32)


def step_seconds(model: LoadedModel, plan: CaptionPlan, captions: int) -> list[float]:
    """How long each step of some captions together takes, from the prefix's end on."""
    rows = captions * MAX_NUM_BEAMS
    limits = SchedulerLimits(captions, rows, captions * MAX_ROWS_TIMES_LENGTH, captions)
    geometry = model.bundle.geometry
    scheduler = Scheduler(
        _Encoder(model),
        GraphStepModel(model.decoder, geometry, captions),
        Vocabulary(model.bundle.special, geometry.vocabulary_size),
        limits,
    )
    for key in range(captions):
        scheduler.submit(Request(key, np.zeros((3, 1, 1), np.uint8), plan))
    seconds: list[float] = []
    while not scheduler.idle:
        begin = time.perf_counter()
        scheduler.step()
        seconds.append(time.perf_counter() - begin)
    return seconds[len(plan.words.prefix) + 2 :]


def relative_costs(folder: Path, captions: int) -> dict[str, float]:
    """Each case's cost of a step in that of plain beams."""
    model = load_model(folder, version=None, threads=0)
    plans = {
        name: model.bundle.plan(given, model.tokenizer.encode)
        for name, given in cases(model.bundle.geometry.max_positions).items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(_ROUNDS):
        for name, plan in plans.items():
            seconds[name] += step_seconds(model, plan, captions)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {name: median / medians[PLAIN] for name, median in medians.items()}


def main() -> None:
    """Print the table for one caption and for four at once."""
    folder = Path(sys.argv[1])
    alone, four = relative_costs(folder, 1), relative_costs(folder, 4)
    sys.stdout.write(f"{'':32} {'one':>6} {'four':>6}\n")
    for name in alone:
        sys.stdout.write(f"{name:32} {alone[name]:6.2f} {four[name]:6.2f}\n")


if __name__ == "__main__":
    main()
