"""Decoding options: one frozen dataclass, validated once, in one place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from captionserve_server.core.errors import InvalidOptionsError

EarlyStopping = Literal["false", "true", "never"]
EARLY_STOPPING_VALUES: tuple[EarlyStopping, ...] = ("false", "true", "never")

MAX_NUM_BEAMS = 16
# A caption is a sentence; a longer one only holds memory that others wait for.
MAX_MAX_LENGTH = 256
# Beyond this the length's power leaves float32 and says nothing about captions any more.
MAX_ABS_LENGTH_PENALTY = 10.0


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """How captions are decoded; names, meanings and defaults of transformers' GenerationConfig.

    Attributes:
        num_beams: beams of the beam search, 1 (greedy) to 16.
        max_length: most tokens of a caption, the decoder start token included, 2 to 256.
        length_penalty: exponent of the length that divides the summed log-probability, -10 to 10.
        early_stopping: "false", "true" or "never".
        num_return_sequences: captions returned, 1 to num_beams.

    Raises:
        InvalidOptionsError: naming every field that is out of range or contradicts another.
    """

    num_beams: int = 1
    # generate() allows 20 tokens beside the start token where nothing says otherwise.
    max_length: int = 21
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "false"
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be decoded, all fields at once."""
        violations = _range_violations(self) | _contradictions(self)
        if violations:
            raise InvalidOptionsError(violations)

    def with_given(self, given: Mapping[str, Any]) -> DecodingOptions:
        """These options with the caller's own in their places.

        Args:
            given: option name to value, holding only what the caller set.

        Raises:
            InvalidOptionsError: if a name is unknown or the result is invalid.
        """
        unknown = set(given) - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise InvalidOptionsError(dict.fromkeys(sorted(unknown), "is not an option"))
        return dataclasses.replace(self, **given)


def _range_violations(options: DecodingOptions) -> dict[str, str]:
    violations: dict[str, str] = {}
    if not 1 <= options.num_beams <= MAX_NUM_BEAMS:
        violations["num_beams"] = f"must be 1 to {MAX_NUM_BEAMS}, is {options.num_beams}"
    if not 2 <= options.max_length <= MAX_MAX_LENGTH:
        violations["max_length"] = f"must be 2 to {MAX_MAX_LENGTH}, is {options.max_length}"
    penalty = options.length_penalty
    if not (math.isfinite(penalty) and abs(penalty) <= MAX_ABS_LENGTH_PENALTY):
        bound = f"{MAX_ABS_LENGTH_PENALTY:g}"
        violations["length_penalty"] = f"must be -{bound} to {bound}, is {penalty:g}"
    if options.early_stopping not in EARLY_STOPPING_VALUES:
        violations["early_stopping"] = f"must be one of {', '.join(EARLY_STOPPING_VALUES)}"
    if options.num_return_sequences < 1:
        violations["num_return_sequences"] = (
            f"must be at least 1, is {options.num_return_sequences}"
        )
    return violations


def _contradictions(options: DecodingOptions) -> dict[str, str]:
    if options.num_return_sequences > options.num_beams >= 1:
        return {
            "num_return_sequences": (
                f"must not exceed num_beams, is {options.num_return_sequences} "
                f"with num_beams {options.num_beams}"
            ),
            "num_beams": "is below num_return_sequences",
        }
    return {}
