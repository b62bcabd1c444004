"""Options are validated once, all fields at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.options import (
    MAX_OPTIONS_BYTES,
    OPTIONS,
    DecodingOptions,
    NamedOptions,
    parse_options,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 20)
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["never", "dog"])
)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)
# Who else may be named beside the fields that were given.
PARTNERS = {"num_beams", "max_length", "do_sample", "num_beam_groups", "diversity_penalty"}


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


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("num_beams", "4", "must be an integer, is text"),
        ("num_beams", 4.0, "must be an integer, is a number"),
        ("num_beams", True, "must be an integer, is a boolean"),
        ("num_beams", [4], "must be an integer, is a list"),
        ("num_beams", 10**5000, "must be 1 to 16, is an integer beyond 64 bits"),
        ("length_penalty", True, "must be a number, is a boolean"),
        ("length_penalty", 10**400, "must be -10 to 10, is inf"),
        ("length_penalty", math.nan, "must be -10 to 10, is nan"),
        ("do_sample", 1, "must be true or false, is an integer"),
        ("early_stopping", 1, 'must be true or false or "never", is an integer'),
        ("early_stopping", "true", "must be true or false or \"never\", is 'true'"),
        ("prefix", 7, "must be text, is an integer"),
        ("prefix", "\ud800", "must be valid Unicode"),
        ("bad_words", "dog", "must be a list, is text"),
        ("bad_words", [1], "each must be text, is an integer"),
        ("suppress_tokens", 3, "must be a list, is an integer"),
        ("suppress_tokens", [True], "each must be an integer, is a boolean"),
    ],
    ids=range(17),  # An integer of thousands of digits has no text.
)
def test_a_wrong_type_is_said_in_words(name: str, value: object, text: str) -> None:
    with pytest.raises(InvalidOptionsError) as caught:
        DecodingOptions().with_given({name: value})
    assert caught.value.field_violations == {name: text}


def test_faults_of_every_kind_are_named_at_once() -> None:
    wrong = {"num_beams": "4", "max_length": 1, "bad_words": 3, "prefiks": "a", "seed": 1}
    with pytest.raises(InvalidOptionsError) as caught:
        DecodingOptions().with_given(wrong)
    assert set(caught.value.field_violations) == {*wrong, "do_sample"}


@given(st.dictionaries(st.sampled_from(list(OPTIONS)), JSON_VALUES, max_size=5))
@settings(deadline=None)  # A busy machine is no fault.
@example({"num_beams": 0, "num_return_sequences": 2})
def test_any_json_is_valid_or_refused_by_the_names_in_it(values: dict[str, object]) -> None:
    named: set[str] = set()
    text = ""
    try:
        options = DecodingOptions().with_given(parse_options(json.dumps(values)))
    except InvalidOptionsError as error:
        named, text = set(error.field_violations), error.message
    if named:
        assert named & values.keys()
        assert named <= values.keys() | PARTNERS
        assert len(text) < 200 * len(named)
    else:
        assert DecodingOptions.from_given(json.loads(json.dumps(options.as_given()))) == options


def test_none_and_null_are_not_set() -> None:
    assert DecodingOptions().with_given({"num_beams": None}) == DecodingOptions()
    assert parse_options('{"num_beams": null, "bad_words": []}') == {"bad_words": []}


def test_an_empty_list_is_set() -> None:
    defaults = DecodingOptions(bad_words=("cat",))
    assert defaults.with_given({"bad_words": []}).bad_words == ()
    assert defaults.with_given({}).bad_words == ("cat",)


def test_numbers_of_numpy_become_plain() -> None:
    options = DecodingOptions().with_given(
        {"num_beams": np.int64(3), "length_penalty": np.float32(0.5), "repetition_penalty": 2}
    )
    assert (options.num_beams, options.length_penalty, options.repetition_penalty) == (3, 0.5, 2.0)
    assert type(options.num_beams) is int
    assert type(options.length_penalty) is type(options.repetition_penalty) is float


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "4",
        "null",
        '"num_beams"',
        b"\xff",
        '{"bad_words": ' + "[" * 100_000,
        "{" + " " * MAX_OPTIONS_BYTES + "}",
        "\ud800",
    ],
    ids=range(10),
)
def test_what_is_no_json_object_is_refused_as_a_whole(text: str | bytes) -> None:
    with pytest.raises(InvalidOptionsError) as caught:
        parse_options(text)
    assert set(caught.value.field_violations) == {"options"}


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(InvalidOptionsError) as caught:
        parse_options('{"num_beams": 1, "num_beams": 2}')
    assert set(caught.value.field_violations) == {"num_beams"}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_finite_number_is_refused_by_its_field(number: str) -> None:
    given = parse_options(f'{{"length_penalty": {number}}}')
    with pytest.raises(InvalidOptionsError) as caught:
        DecodingOptions().with_given(given)
    assert set(caught.value.field_violations) == {"length_penalty"}


@pytest.mark.parametrize("name", ["num_beams", "max_length", "seed", "length_penalty"])
@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.parametrize("digits", [20, 400, 5000, 100_000])
def test_a_number_of_any_digits_is_refused_by_its_field(name: str, sign: str, digits: int) -> None:
    given = parse_options(f'{{"do_sample": true, "{name}": {sign}{"9" * digits}}}')
    with pytest.raises(InvalidOptionsError) as caught:
        DecodingOptions().with_given(given)
    assert set(caught.value.field_violations) == {name}
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("penalty", [5e-324, 1e-50, 1e-38, 0.0099])
def test_a_penalty_that_takes_logits_out_of_float32_is_refused(penalty: float) -> None:
    with pytest.raises(InvalidOptionsError) as caught:
        DecodingOptions().with_given({"repetition_penalty": penalty})
    assert set(caught.value.field_violations) == {"repetition_penalty"}


def test_defaults_that_wait_for_sampling_survive_the_round_trip() -> None:
    options = DecodingOptions(temperature=0.7, length_penalty=0.1, bad_words=("a cat",))
    assert DecodingOptions.from_given(json.loads(json.dumps(options.as_given()))) == options


def test_options_by_name_are_those_of_decoding() -> None:
    assert list(NamedOptions.__annotations__) == list(OPTIONS)
