"""The decoding options are one set, wherever they are written down; so are the enums."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
from captionserve import FinishReason, GenerationOptions
from captionserve._options import to_proto
from captionserve._results import from_proto
from captionserve.v1 import caption_pb2
from captionserve_server.cli.decoding_options import _TABLE
from captionserve_server.core import captions
from captionserve_server.core.options import EARLY_STOPPING_VALUES, DecodingOptions
from captionserve_server.gateway.conversion import (
    EARLY_STOPPING,
    FINISH_REASONS,
    captioner_inputs,
)
from captionserve_server.triton import wire
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor

PROTO_FIELDS = caption_pb2.GenerationOptions.DESCRIPTOR.fields_by_name
NAMES = set(PROTO_FIELDS)
TRITON_TYPES = {
    FieldDescriptor.TYPE_BOOL: "TYPE_BOOL",
    FieldDescriptor.TYPE_INT32: "TYPE_INT32",
    FieldDescriptor.TYPE_INT64: "TYPE_INT64",
    FieldDescriptor.TYPE_DOUBLE: "TYPE_FP64",
    FieldDescriptor.TYPE_STRING: "TYPE_STRING",
    FieldDescriptor.TYPE_ENUM: "TYPE_STRING",
}
PYTHON_TYPES = {
    FieldDescriptor.TYPE_BOOL: bool,
    FieldDescriptor.TYPE_INT32: int,
    FieldDescriptor.TYPE_INT64: int,
    FieldDescriptor.TYPE_DOUBLE: float,
    FieldDescriptor.TYPE_STRING: str,
    FieldDescriptor.TYPE_ENUM: str,
}
# Each option with a value that is not its default.
VALUES: dict[str, Any] = {
    "num_beams": 4,
    "max_length": 20,
    "min_length": 3,
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
}


def enum_names(descriptor: EnumDescriptor, prefix: str) -> set[str]:
    """The values' names in lower case, without prefix and without UNSPECIFIED."""
    names = {value.name.removeprefix(prefix).lower() for value in descriptor.values}
    return names - {"unspecified"}


def request_of(options: GenerationOptions) -> caption_pb2.CaptionRequest:
    return caption_pb2.CaptionRequest(
        image=caption_pb2.Image(encoded=b"x"), options=to_proto(options)
    )


def test_every_place_has_the_same_options() -> None:
    assert {field.name for field in dataclasses.fields(GenerationOptions)} == NAMES
    assert {field.name for field in dataclasses.fields(DecodingOptions)} == NAMES
    assert set(wire.OPTION_TENSORS) == NAMES
    assert set(_TABLE) == NAMES
    assert set(VALUES) == NAMES
    assert len(NAMES) == 22


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_option_has_a_tensor_of_its_own_type(name: str) -> None:
    spec, field = wire.OPTION_TENSORS[name], PROTO_FIELDS[name]
    assert spec.name == name.upper()
    assert spec.data_type == TRITON_TYPES[field.type]
    assert spec.dims == ((-1,) if field.is_repeated else (1,))
    assert spec.optional


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_option_tells_unset_from_zero(name: str) -> None:
    field = PROTO_FIELDS[name]
    # An enum has UNSPECIFIED for that, and an empty list is the same as none.
    says_it_otherwise = field.is_repeated or field.enum_type is not None
    assert field.has_presence is not says_it_otherwise


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_command_line_has_each_option_in_its_own_type(name: str) -> None:
    field = PROTO_FIELDS[name]
    element = PYTHON_TYPES[field.type]
    assert _TABLE[name][0] == (list[element] if field.is_repeated else element)  # type: ignore[valid-type]  # Of a table.


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_option_travels_from_the_client_to_the_captioner(name: str) -> None:
    value = VALUES[name]
    inputs = captioner_inputs(request_of(GenerationOptions(**{name: value})))
    assert value != getattr(DecodingOptions(), name)
    expected = value if isinstance(value, list) else [value]
    assert inputs == {wire.IMAGE: [b"x"], wire.OPTION_TENSORS[name]: expected}


def test_all_options_travel_together() -> None:
    inputs = captioner_inputs(request_of(GenerationOptions(**VALUES)))
    arrived = {name: inputs[spec] for name, spec in wire.OPTION_TENSORS.items()}
    assert arrived == {
        name: value if isinstance(value, list) else [value] for name, value in VALUES.items()
    }


def test_options_that_are_not_set_do_not_travel() -> None:
    assert captioner_inputs(request_of(GenerationOptions())) == {wire.IMAGE: [b"x"]}


def test_early_stopping_has_the_same_values_everywhere() -> None:
    descriptor = caption_pb2.EarlyStopping.DESCRIPTOR
    assert enum_names(descriptor, "EARLY_STOPPING_") == set(EARLY_STOPPING_VALUES)
    assert sorted(EARLY_STOPPING.values()) == sorted(EARLY_STOPPING_VALUES)
    for value, name in EARLY_STOPPING.items():
        assert descriptor.values_by_number[value].name == f"EARLY_STOPPING_{name.upper()}"


@pytest.mark.parametrize(("value", "text"), [(False, "false"), (True, "true"), ("never", "never")])
def test_early_stopping_means_the_same_at_both_ends(value: bool | str, text: str) -> None:
    sent = to_proto(GenerationOptions(early_stopping=value))  # type: ignore[arg-type]  # Of a table.
    assert EARLY_STOPPING[sent.early_stopping] == text


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
