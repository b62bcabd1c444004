"""The options under which captions must equal transformers' generate()."""

from __future__ import annotations

import dataclasses
from typing import Any

from captionserve_server.core.options import EARLY_STOPPING_VALUES, DecodingOptions

MAX_LENGTH = 14

OPTION_GRID = [
    DecodingOptions(num_beams=1, max_length=MAX_LENGTH),
    *(
        DecodingOptions(
            num_beams=num_beams,
            max_length=MAX_LENGTH,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=1 + (num_beams > 3),
        )
        for num_beams in (2, 3, 4, 5)
        for length_penalty in (0.5, 1.0, 2.0)
        for early_stopping in EARLY_STOPPING_VALUES
    ),
]
"""Greedy search, and every combination of beams, length penalty and early stopping."""


def generate_options(options: DecodingOptions) -> dict[str, Any]:
    """Our options as keyword arguments of generate()."""
    early_stopping = {"false": False, "true": True, "never": "never"}[options.early_stopping]
    return dataclasses.asdict(options) | {"early_stopping": early_stopping}
