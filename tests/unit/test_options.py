"""Options are validated once, all fields at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.options import DecodingOptions


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"num_beams": 0}, {"num_beams"}),
        ({"num_beams": 17}, {"num_beams"}),
        ({"num_beams": -(2**31)}, {"num_beams"}),
        ({"max_length": 1}, {"max_length"}),
        ({"max_length": 100_000}, {"max_length"}),
        ({"length_penalty": math.nan}, {"length_penalty"}),
        ({"length_penalty": math.inf}, {"length_penalty"}),
        ({"length_penalty": -10.5}, {"length_penalty"}),
        ({"early_stopping": "sometimes"}, {"early_stopping"}),
        ({"num_return_sequences": 0}, {"num_return_sequences"}),
        ({"num_return_sequences": 2}, {"num_return_sequences", "num_beams"}),
        ({"num_beams": 0, "max_length": 0}, {"num_beams", "max_length"}),
        ({"temperture": 1.0}, {"temperture"}),
    ],
)
def test_each_wrong_field_is_named(given: dict[str, Any], fields: set[str]) -> None:
    with pytest.raises(InvalidOptionsError) as caught:
        DecodingOptions().with_given(given)
    assert set(caught.value.field_violations) == fields


def test_what_is_given_replaces_the_default() -> None:
    defaults = DecodingOptions(num_beams=3, max_length=12)
    options = defaults.with_given({"num_beams": 5, "num_return_sequences": 5})
    assert options == DecodingOptions(num_beams=5, max_length=12, num_return_sequences=5)


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodingOptions().num_beams = 2  # type: ignore[misc]
