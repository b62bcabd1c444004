"""The decoding options are one set, wherever they are written down; so are the enums."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from captionserve import CaptionError, FinishReason, GenerationOptions, ReviewReason
from captionserve._options import to_proto
from captionserve._results import from_proto
from captionserve.v1 import caption_pb2
from captionserve_server.core import captions, results
from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.options import (
    EARLY_STOPPING_VALUES,
    OPTIONS,
    DecodingOptions,
    NamedOptions,
)
from captionserve_server.gateway.conversion import (
    FINISH_REASONS,
    REVIEW_REASONS,
    decoder_message,
)
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

PROTO_FIELDS = caption_pb2.GenerationOptions.DESCRIPTOR.fields_by_name
NAMES = set(PROTO_FIELDS)
GENERATION_TYPES = get_type_hints(GenerationOptions)
NAMED_TYPES = get_type_hints(NamedOptions)
PYTHON_TYPES = {
    FieldDescriptor.TYPE_BOOL: bool,
    FieldDescriptor.TYPE_INT32: int,
    FieldDescriptor.TYPE_INT64: int,
    FieldDescriptor.TYPE_DOUBLE: float,
    FieldDescriptor.TYPE_STRING: str,
}
# Each option with a value that is not its default.
VALUES: dict[str, Any] = {
    "num_beams": 4,
    "max_length": 20,
    "min_length": 3,
    "max_new_tokens": 9,
    "min_new_tokens": 2,
    "length_penalty": 0.5,
    "early_stopping": "never",
    "num_return_sequences": 2,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 0.9,
    "min_p": 0.1,
    "seed": 2**62 + 1,
    "num_beam_groups": 2,
    "diversity_penalty": 0.25,
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words": ["a cat", "caf\u00e9"],
    "force_words": ["dog"],
    "prefix": "a photo of",
    "suppress_tokens": [0, 7],
    "output_attentions": True,
    "allow_partial": True,
    "output_grounding": True,
    "rerank": "grounding",
    "min_confidence": 0.5,
    "output_beams": True,
    "output_stages": True,
}


def enum_names(descriptor: EnumDescriptor, prefix: str) -> set[str]:
    """The values' names in lower case, without prefix and without UNSPECIFIED."""
    names = {value.name.removeprefix(prefix).lower() for value in descriptor.values}
    return names - {"unspecified"}


def test_every_place_has_the_same_options() -> None:
    assert {field.name for field in dataclasses.fields(GenerationOptions)} == NAMES
    assert set(OPTIONS) == NAMES
    assert set(VALUES) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_option_has_the_same_type_on_the_wire_and_in_the_core(name: str) -> None:
    option, field = OPTIONS[name], PROTO_FIELDS[name]
    if field.enum_type is not None:
        words = enum_names(field.enum_type, f"{name.upper()}_") - {"true", "false"}
        assert set(option.words) == words
        assert option.kind is (bool if name == "early_stopping" else str)
        return
    element = field if field.message_type is None else field.message_type.fields_by_name["values"]
    assert option.kind is PYTHON_TYPES[element.type]
    assert (option.max_items is not None) is (field.message_type is not None)
    # The largest number of the core can be sent.
    if option.kind is int:
        bits = 63 if element.type == FieldDescriptor.TYPE_INT64 else 31
        assert option.most is not None
        assert option.most < 2**bits


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_option_tells_unset_from_zero(name: str) -> None:
    field = PROTO_FIELDS[name]
    # An enum has UNSPECIFIED for that.
    assert field.has_presence is (field.enum_type is None)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_client_annotates_each_option_with_the_cores_type(name: str) -> None:
    assert name == "early_stopping" or GENERATION_TYPES[name] == NAMED_TYPES[name]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_option_is_taken_by_the_client_and_by_the_core(name: str) -> None:
    value = VALUES[name]
    assert to_proto(GenerationOptions(**{name: value})).ByteSize() > 0
    assert OPTIONS[name].fault(tuple(value) if isinstance(value, list) else value) is None
    assert value != DecodingOptions().as_given().get(name)


EDGES = [
    True,
    0,
    -1,
    1.0,
    2**31,
    -(2**63) - 1,
    10**400,
    -(10**400),
    5e-324,
    1e-46,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "x" * 501,
    "\ud800",
    b"red",
    [],
    [True],
    [10**400],
    ["\ud800"],
    [[]],
    {},
    object(),
]


def refused_by_the_core(given: Mapping[str, Any]) -> set[str]:
    try:
        DecodingOptions().with_given(given)
    except InvalidOptionsError as error:
        return {f"options.{name}" for name in error.field_violations}
    return set()


def refused_by_client_or_service(given: dict[str, Any]) -> set[str]:
    try:
        options = to_proto(GenerationOptions(**given))
    except CaptionError as error:
        # Any other would fail the test by the fields that it does not name.
        return set(error.field_violations) if error.reason == "INVALID_OPTIONS" else set()
    request = caption_pb2.CaptionRequest(
        image=caption_pb2.Image(encoded=b"any"),
        options=caption_pb2.GenerationOptions.FromString(options.SerializeToString()),
    )
    return refused_by_the_core(decoder_message(request).given)


@pytest.mark.parametrize("value", EDGES, ids=range(len(EDGES)))
@pytest.mark.parametrize("name", sorted(NAMES))
def test_values_at_the_edges_are_refused_equally_by_client_and_service(
    name: str, value: Any
) -> None:
    assert refused_by_client_or_service({name: value}) == refused_by_the_core({name: value})


def test_the_table_of_options_is_up_to_date() -> None:
    script = Path(__file__).resolve().parents[2] / "docs" / "generate_pages.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_early_stopping_has_the_same_values_everywhere() -> None:
    descriptor = caption_pb2.EarlyStopping.DESCRIPTOR
    values = {str(value).lower() for value in EARLY_STOPPING_VALUES}
    assert enum_names(descriptor, "EARLY_STOPPING_") == values
    for value in EARLY_STOPPING_VALUES:
        sent = to_proto(GenerationOptions(early_stopping=value)).early_stopping
        assert descriptor.values_by_number[sent].name == f"EARLY_STOPPING_{value}".upper()


def test_review_reasons_are_the_same_everywhere() -> None:
    names = enum_names(caption_pb2.ReviewReason.DESCRIPTOR, "REVIEW_REASON_")
    assert {reason.value for reason in ReviewReason} - {ReviewReason.UNKNOWN.value} == names
    assert set(get_args(results.ReviewReason)) == names
    for name, number in REVIEW_REASONS.items():
        caption = caption_pb2.Caption(review_reasons=[number])
        found = from_proto(caption_pb2.CaptionResponse(captions=[caption])).captions[0]
        assert [reason.value for reason in found.review_reasons] == [name]
    assert set(REVIEW_REASONS) == names


def test_finish_reasons_are_the_same_everywhere() -> None:
    descriptor = caption_pb2.FinishReason.DESCRIPTOR
    names = enum_names(descriptor, "FINISH_REASON_")
    assert {reason.value for reason in FinishReason} - {FinishReason.UNKNOWN.value} == names
    assert set(FINISH_REASONS) == names
    assert set(get_args(captions.FinishReason)) == names


@pytest.mark.parametrize("name", get_args(captions.FinishReason))
def test_finish_reasons_mean_the_same_at_both_ends(name: str) -> None:
    caption = caption_pb2.Caption(finish_reason=FINISH_REASONS[name])
    result = from_proto(caption_pb2.CaptionResponse(captions=[caption]))
    assert result.captions[0].finish_reason.value == name
