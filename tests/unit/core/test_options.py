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
        ({"do_sample": True, "num_return_sequences": 17}, {"num_return_sequences"}),
        ({"min_length": -1}, {"min_length"}),
        ({"min_length": 30}, {"min_length", "max_length"}),
        ({"do_sample": True, "temperature": 0.0}, {"temperature"}),
        ({"do_sample": True, "temperature": math.nan}, {"temperature"}),
        ({"do_sample": True, "top_k": -1}, {"top_k"}),
        ({"do_sample": True, "top_p": 0.0}, {"top_p"}),
        ({"do_sample": True, "top_p": 1.1}, {"top_p"}),
        ({"do_sample": True, "min_p": -0.1}, {"min_p"}),
        ({"do_sample": True, "seed": -1}, {"seed"}),
        ({"do_sample": True, "num_beams": 2}, {"do_sample", "num_beams"}),
        ({"temperature": 0.5}, {"temperature", "do_sample"}),
        ({"seed": 1, "top_p": 0.5}, {"seed", "top_p", "do_sample"}),
        ({"num_beams": 4, "num_beam_groups": 3}, {"num_beam_groups", "num_beams"}),
        ({"num_beams": 4, "num_beam_groups": 2}, {"num_beam_groups", "diversity_penalty"}),
        ({"num_beams": 4, "diversity_penalty": 1.0}, {"num_beam_groups", "diversity_penalty"}),
        ({"num_beam_groups": 0}, {"num_beam_groups"}),
        ({"diversity_penalty": math.inf}, {"diversity_penalty"}),
        ({"repetition_penalty": 0.0}, {"repetition_penalty"}),
        ({"repetition_penalty": -1.0}, {"repetition_penalty"}),
        ({"no_repeat_ngram_size": -1}, {"no_repeat_ngram_size"}),
        ({"bad_words": ("",)}, {"bad_words"}),
        ({"bad_words": ("x" * 101,)}, {"bad_words"}),
        ({"bad_words": ("x",) * 65}, {"bad_words"}),
        ({"force_words": ("dog",)}, {"force_words", "num_beams"}),
        ({"force_words": ("dog",), "do_sample": True}, {"force_words", "num_beams"}),
        ({"force_words": (" ",), "num_beams": 2}, {"force_words"}),
        (
            {"force_words": ("dog",), "bad_words": (" dog",), "num_beams": 2},
            {"force_words", "bad_words"},
        ),
        (
            {
                "force_words": ("dog",),
                "num_beams": 4,
                "num_beam_groups": 2,
                "diversity_penalty": 1.0,
            },
            {"force_words", "num_beam_groups"},
        ),
        ({"prefix": "x" * 501}, {"prefix"}),
        ({"suppress_tokens": (-1,)}, {"suppress_tokens"}),
        ({"suppress_tokens": (1,) * 257}, {"suppress_tokens"}),
        ({"num_beams": 16, "max_length": 200}, {"num_beams", "max_length"}),
        (
            {"do_sample": True, "num_return_sequences": 16, "max_length": 200},
            {"num_return_sequences", "max_length"},
        ),
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


def test_who_samples_does_not_mean_the_checkpoints_beams() -> None:
    defaults = DecodingOptions(num_beams=4, num_beam_groups=2, diversity_penalty=0.5)
    assert defaults.with_given({"do_sample": True}).num_beams == 1
    with pytest.raises(InvalidOptionsError):
        defaults.with_given({"do_sample": True, "num_beams": 4})


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodingOptions().num_beams = 2  # type: ignore[misc]


def test_sampling_settings_of_the_checkpoint_do_not_bind_who_does_not_sample() -> None:
    defaults = DecodingOptions(temperature=0.7, top_k=20)
    assert not defaults.with_given({"num_beams": 2}).do_sample
    assert defaults.with_given({"do_sample": True}).temperature == 0.7


@pytest.mark.parametrize(
    ("given", "reproducible"),
    [
        ({}, True),
        ({"do_sample": True}, False),
        ({"do_sample": True, "seed": 0}, True),
        ({"allow_partial": True}, False),
    ],
)
def test_what_is_reproducible(given: dict[str, Any], reproducible: bool) -> None:
    assert DecodingOptions().with_given(given).reproducible == reproducible
