"""The decoding options of a caller in the same process, by name and with Python's own types."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from captionserve_server.triton import wire

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What each of Triton's data types is in Python, and how a value of that kind becomes plain: the
# options' types are said once, where their tensors are.
_PLAIN_TYPES: Mapping[str, tuple[type, type]] = {
    "TYPE_INT32": (numbers.Integral, int),
    "TYPE_INT64": (numbers.Integral, int),
    "TYPE_FP64": (numbers.Real, float),
    "TYPE_BOOL": (bool, bool),
    "TYPE_STRING": (str, str),
}
_EARLY_STOPPING = {True: "true", False: "false"}


class NamedOptions(TypedDict, total=False):
    """The decoding options as keyword arguments; core/options.py says what each of them does."""

    num_beams: int
    max_length: int
    min_length: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_return_sequences: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    num_beam_groups: int
    diversity_penalty: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    bad_words: Sequence[str]
    force_words: Sequence[str]
    prefix: str
    suppress_tokens: Sequence[int]
    output_attentions: bool
    allow_partial: bool


def given_options(
    options: DataclassInstance | None, named: Mapping[str, object]
) -> dict[str, object]:
    """What a caller set, as DecodingOptions wants it; None is what was not set.

    Args:
        options: a dataclass with the options' names, such as the client's GenerationOptions.
        named: option name to value; these come before those of `options`.

    Raises:
        TypeError: if a value has the wrong type.
    """
    values = {} if options is None else _fields(options)
    values |= {name: value for name, value in named.items() if value is not None}
    return {name: _plain(name, value) for name, value in values.items() if value is not None}


def _fields(options: DataclassInstance) -> dict[str, object]:
    # Not asdict, which copies.
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def _plain(name: str, value: object) -> object:
    """A value in the option's own type; that of an unknown option as it is."""
    spec = wire.OPTION_TENSORS.get(name)
    if spec is None:
        return value
    if name == "early_stopping" and isinstance(value, bool):
        return _EARLY_STOPPING[value]
    try:
        if spec.dims == (1,):
            return _one(spec.data_type, value)
        return tuple(_one(spec.data_type, each) for each in _several(value))
    except TypeError as error:
        raise TypeError(f"{name} has the wrong type: {type(value).__name__}") from error


def _one(data_type: str, value: Any) -> object:
    wanted, plain = _PLAIN_TYPES[data_type]
    # True is a number to Python, but nobody's number of beams.
    if not isinstance(value, wanted) or (isinstance(value, bool) and plain is not bool):
        raise TypeError(f"{plain.__name__} is wanted")
    return plain(value)


def _several(value: object) -> Sequence[object]:
    # Text is a sequence of letters, which nobody means.
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError("a sequence is wanted")
    return value
