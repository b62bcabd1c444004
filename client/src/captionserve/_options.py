"""The decoding options a caller may set, and their form on the wire."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Literal

import grpc
from google.protobuf.descriptor import FieldDescriptor

from captionserve._errors import CaptionError
from captionserve.v1 import caption_pb2


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How a caption is decoded; names and meanings are those of transformers' GenerationConfig.

    Words are text, which the server tokenises. None leaves an option to the server's checkpoint.
    Types are checked when the options are sent, ranges by the server; either way a CaptionError
    names every field at fault.

    Attributes:
        num_beams: beams of the beam search; 1 is greedy search, or sampling with do_sample.
        max_length: most tokens of a caption, counting the decoder start token.
        min_length: fewest tokens of a caption, counting the decoder start token.
        max_new_tokens: most tokens generated, start token and prefix not counted; instead of
            max_length.
        min_new_tokens: fewest tokens generated, likewise; instead of min_length.
        length_penalty: exponent of the length that divides a caption's summed log-probability.
        early_stopping: True stops once num_beams captions are complete, False when better ones are
            unlikely, "never" only when no better one is possible.
        num_return_sequences: captions to return, best first.
        do_sample: draw tokens instead of taking the likeliest.
        temperature: divides the logits before drawing.
        top_k: draw among so many of the likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability.
        min_p: draw among tokens with at least this share of the likeliest one's probability.
        seed: of the draws; the same seed gives the same captions.
        num_beam_groups: groups of beams that are kept apart from each other.
        diversity_penalty: how far they are kept apart.
        repetition_penalty: above 1 makes tokens that have occurred unlikelier.
        no_repeat_ngram_size: no n-gram of this many tokens occurs twice; 0 is off.
        bad_words: words or phrases that are not generated.
        force_words: words or phrases that every caption contains; needs num_beams above 1.
        prefix: text with which the caption begins.
        suppress_tokens: token ids that are not generated.
        output_attentions: return where in the image each token looked.
        allow_partial: when the deadline comes first, return the best so far instead of failing.
        output_grounding: return how much likelier the image makes each token than no image does.
        rerank: what puts captions in order and says which are returned: "likelihood", which is
            their score, or "grounding", of all that num_beams or num_return_sequences made.
        min_confidence: captions of a lower confidence say needs_review; 0 for none.
        output_beams: return what the search considered at each step.
        output_stages: return how long each stage took.
    """

    num_beams: int | None = None
    max_length: int | None = None
    min_length: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    num_return_sequences: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words: Sequence[str] | None = None
    force_words: Sequence[str] | None = None
    prefix: str | None = None
    suppress_tokens: Sequence[int] | None = None
    output_attentions: bool | None = None
    allow_partial: bool | None = None
    output_grounding: bool | None = None
    rerank: Literal["likelihood", "grounding"] | None = None
    min_confidence: float | None = None
    output_beams: bool | None = None
    output_stages: bool | None = None


_BITS = {FieldDescriptor.TYPE_INT32: 32, FieldDescriptor.TYPE_INT64: 64}
_WANTED = {
    FieldDescriptor.TYPE_BOOL: "true or false",
    FieldDescriptor.TYPE_INT32: "an integer",
    FieldDescriptor.TYPE_INT64: "an integer",
    FieldDescriptor.TYPE_DOUBLE: "a number",
    FieldDescriptor.TYPE_STRING: "text",
}
_TYPE_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}
_SHOWN_CHARACTERS = 40


def to_proto(options: GenerationOptions) -> caption_pb2.GenerationOptions:
    """Write the options that are set as a message.

    Raises:
        CaptionError: if values have the wrong type or cannot be sent; INVALID_OPTIONS with every
            field named, as the service answers to those that are out of range.
    """
    message = caption_pb2.GenerationOptions()
    faults: dict[str, str] = {}
    for name, value in vars(options).items():
        if value is not None:
            try:
                _set(message, name, value)
            except ValueError as error:
                faults[name] = str(error)
    if faults:
        raise CaptionError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_OPTIONS",
            "; ".join(f"{name}: {fault}" for name, fault in faults.items()),
            {f"options.{name}": fault for name, fault in faults.items()},
        )
    return message


def _set(message: caption_pb2.GenerationOptions, name: str, value: object) -> None:
    """Set a field; ValueError says what is wrong with the value."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is None:
        setattr(message, name, _plain(field, value))
        return
    # Text is a sequence of letters, which nobody means.
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise ValueError(f"must be a list, is {_type_name(value)}")
    element = field.message_type.fields_by_name["values"]
    try:
        plain = [_plain(element, each) for each in value]
    except ValueError as error:
        raise ValueError(f"each {error}") from error
    values = getattr(message, name)
    # An empty list is set too: it is not the checkpoint's default.
    values.SetInParent()
    values.values.extend(plain)


def _plain(field: FieldDescriptor, value: object) -> object:
    """A value as the field takes it. What protobuf itself takes for a number is more than that."""
    kind = field.type
    if kind == FieldDescriptor.TYPE_ENUM:
        return _number(field, value)
    if kind == FieldDescriptor.TYPE_BOOL and isinstance(value, bool):
        return value
    if kind == FieldDescriptor.TYPE_STRING and isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("must be valid Unicode")
        return value
    if kind in _BITS and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        most = 2 ** (_BITS[kind] - 1)
        if not -most <= value < most:
            raise ValueError(f"must be an integer of at most {_BITS[kind]} bits")
        return int(value)
    if (
        kind == FieldDescriptor.TYPE_DOUBLE
        and isinstance(value, numbers.Real)
        and not isinstance(value, bool)
    ):
        try:
            return float(value)
        except OverflowError:
            # An integer beyond all floats: out of every range.
            return -math.inf if isinstance(value, int) and value < 0 else math.inf
    raise ValueError(f"must be {_WANTED[kind]}, is {_type_name(value)}")


def _number(field: FieldDescriptor, value: object) -> int:
    """The number of an enum's value; ValueError for a value that it does not have."""
    values = _values(field)
    # 1 equals True, but nobody means the one by the other.
    if isinstance(value, (bool, str)) and value in values:
        return values[value]
    wanted = ["true or false"] if True in values else []
    wanted += [f'"{word}"' for word in values if isinstance(word, str)]
    shown = repr(_short(value)) if isinstance(value, str) else _type_name(value)
    raise ValueError(f"must be {' or '.join(wanted)}, is {shown}")


def _values(field: FieldDescriptor) -> dict[bool | str, int]:
    """What an option of an enum may be, and its numbers, whose names say it behind the option's."""
    words = {
        value.name.removeprefix(f"{field.name.upper()}_").lower(): value.number
        for value in (field.enum_type.values if field.enum_type is not None else ())
        if value.number
    }
    return {{"true": True, "false": False}.get(word, word): at for word, at in words.items()}


def _type_name(value: object) -> str:
    return _TYPE_NAMES.get(type(value), _short(type(value).__name__))


def _short(text: object) -> str:
    """What the caller wrote, short enough for an error."""
    shown = str(text)
    return shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 3] + "..."


def options_from_proto(message: caption_pb2.GenerationOptions) -> dict[str, object]:
    """The options that are set, by name, as GenerationOptions takes them."""
    values: dict[str, object] = {}
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_ENUM:
            values[field.name] = next(v for v, number in _values(field).items() if number == value)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            values[field.name] = tuple(value.values)
        else:
            values[field.name] = value
    return values
