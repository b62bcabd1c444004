"""Options in Python and on the wire hold the same values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from captionserve import GenerationOptions
from captionserve._options import to_proto
from captionserve.v1 import caption_pb2
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

PROTO_FIELDS = caption_pb2.GenerationOptions.DESCRIPTOR.fields_by_name
NAMES = [field.name for field in dataclasses.fields(GenerationOptions)]
REPEATED = ["bad_words", "force_words", "suppress_tokens"]
# Of each option that has names for values.
MEANINGS: dict[str, dict[int, bool | str]] = {
    "early_stopping": {
        caption_pb2.EARLY_STOPPING_FALSE: False,
        caption_pb2.EARLY_STOPPING_TRUE: True,
        caption_pb2.EARLY_STOPPING_NEVER: "never",
    },
    "rerank": {
        caption_pb2.RERANK_LIKELIHOOD: "likelihood",
        caption_pb2.RERANK_GROUNDING: "grounding",
    },
}
ELEMENTS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_DOUBLE: st.floats(allow_nan=False),
    FieldDescriptor.TYPE_STRING: st.text(st.characters(codec="utf-8")),
}


def values_of(name: str) -> st.SearchStrategy[Any]:
    """What an option may hold."""
    field = PROTO_FIELDS[name]
    if name in MEANINGS:
        return st.sampled_from(list(MEANINGS[name].values()))
    if field.message_type is None:
        return ELEMENTS[field.type]
    return st.lists(ELEMENTS[field.message_type.fields_by_name["values"].type])


def read_back(message: caption_pb2.GenerationOptions) -> dict[str, Any]:
    """The options that are set in a message, as Python has them."""
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name in MEANINGS:
            values[field.name] = MEANINGS[field.name][value]
        else:
            values[field.name] = value if field.message_type is None else list(value.values)
    return values


@given(st.fixed_dictionaries({}, optional={name: values_of(name) for name in NAMES}))
def test_options_are_sent_as_they_are(options: dict[str, Any]) -> None:
    assert read_back(to_proto(GenerationOptions(**options))) == options


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REPEATED])
def test_zero_is_not_unset(name: str) -> None:
    names = MEANINGS.get(name)
    zero: Any = PROTO_FIELDS[name].default_value if names is None else next(iter(names.values()))
    assert read_back(to_proto(GenerationOptions(**{name: zero}))) == {name: zero}


def test_the_largest_seed_is_sent() -> None:
    assert to_proto(GenerationOptions(seed=2**63 - 1)).seed == 2**63 - 1


@pytest.mark.parametrize("name", REPEATED)
def test_an_empty_list_is_not_unset(name: str) -> None:
    empty: Any = []
    assert read_back(to_proto(GenerationOptions(**{name: empty}))) == {name: []}


@pytest.mark.parametrize("words", [["a cat"], ("a cat",)])
def test_any_sequence_of_words_is_sent(words: Any) -> None:
    assert read_back(to_proto(GenerationOptions(bad_words=words))) == {"bad_words": ["a cat"]}
