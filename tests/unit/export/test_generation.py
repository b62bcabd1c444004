"""What of a checkpoint's generation settings is followed, dropped or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from captionserve_server.core.options import OPTIONS
from captionserve_server.export.generation import (
    CALLERS,
    FOLLOWED,
    REFUSED,
    SAMPLING_ONLY,
    WITHOUT_EFFECT,
    Generation,
    UnsupportedSettingError,
    read_generation,
)
from transformers import GenerationConfig

SIZE, POSITIONS = 300, 40
SPECIAL = {"decoder_start_token_id": 299, "eos_token_id": 299}


def read(**settings: Any) -> Generation:
    return read_generation(SPECIAL | settings, SIZE, POSITIONS)


@pytest.mark.parametrize(
    "name", [name for name in sorted(vars(GenerationConfig())) if name[0] != "_"]
)
def test_every_setting_of_transformers_is_accounted_for_once(name: str) -> None:
    tables = [FOLLOWED, CALLERS, WITHOUT_EFFECT, SAMPLING_ONLY, REFUSED, OPTIONS.keys() - CALLERS]
    assert sum(name in table for table in tables) == 1


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_followed_is_refused_by_name_unless_it_is_off(name: str) -> None:
    read(**{name: REFUSED[name]})
    with pytest.raises(UnsupportedSettingError, match=name):
        read(**{name: [[5]]})


@pytest.mark.parametrize("name", sorted(SAMPLING_ONLY))
def test_settings_of_sampling_matter_to_sampling_only(name: str) -> None:
    read(**{name: 0.5})
    read(**{name: SAMPLING_ONLY[name]}, do_sample=True)
    with pytest.raises(UnsupportedSettingError, match=name):
        read(**{name: 0.5}, do_sample=True)


def test_a_setting_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedSettingError, match="of_tomorrow"):
        read(of_tomorrow=1)


def test_a_temperature_that_is_never_used_stops_no_export() -> None:
    assert read(temperature=0.0, do_sample=False).defaults.temperature == 1.0
    assert read(temperature=0.7).defaults.temperature == 0.7
    with pytest.raises(UnsupportedSettingError, match="temperature"):
        read(temperature=0.0, do_sample=True)


def test_ids_outside_the_vocabulary_are_dropped_from_lists() -> None:
    read_ = read(
        eos_token_id=[7, 300, -1, 7], suppress_tokens=[5, 999], begin_suppress_tokens=[300, 4]
    )
    assert read_.special.end == (7,)
    assert read_.defaults.suppress_tokens == (5,)
    assert read_.rules.begin_suppress_tokens == (4,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder_start_token_id", 300),
        ("decoder_start_token_id", "a"),
        ("decoder_start_token_id", [1, 2]),
        ("eos_token_id", [300]),
        ("eos_token_id", "end"),
        ("forced_bos_token_id", 300),
        ("forced_eos_token_id", [3, 300]),
        ("sequence_bias", [[[300], 1.0]]),
        ("sequence_bias", [[[3], 1]]),
        ("sequence_bias", [[[3], float("inf")]]),
        ("sequence_bias", [[[], 1.0]]),
        ("sequence_bias", {"3": 1.0}),
        ("sequence_bias", []),
        ("exponential_decay_length_penalty", 3),
        ("exponential_decay_length_penalty", [3, 0.0]),
        ("exponential_decay_length_penalty", ["3", 1.1]),
        ("begin_suppress_tokens", ["a"]),
        ("num_beams", [4]),
        ("num_beams", 64),
        ("max_length", "long"),
        ("max_new_tokens", [3]),
        ("min_new_tokens", -1),
        ("no_repeat_ngram_size", 2.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UnsupportedSettingError, match=name):
        read(**{name: value})


def test_lengths_are_followed_as_far_as_the_decoder_goes() -> None:
    defaults = read(max_new_tokens=512, min_new_tokens=3).defaults
    assert (defaults.max_new_tokens, defaults.min_new_tokens) == (POSITIONS - 1, 3)
    assert read(max_length=512).defaults.max_length == POSITIONS
    assert read().defaults.max_length == 21
