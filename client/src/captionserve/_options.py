"""The decoding options a caller may set, and their form on the wire."""

from __future__ import annotations

import dataclasses
from typing import Literal

from captionserve.v1 import caption_pb2

_EARLY_STOPPING = {
    False: caption_pb2.EARLY_STOPPING_FALSE,
    True: caption_pb2.EARLY_STOPPING_TRUE,
    "never": caption_pb2.EARLY_STOPPING_NEVER,
}


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How a caption is decoded; names and meanings are those of transformers' GenerationConfig.

    None leaves an option to the server's checkpoint. Ranges are checked by the server, which
    answers with a CaptionError that names every field at fault.

    Attributes:
        num_beams: beams of the beam search; 1 is greedy search.
        max_length: most tokens of a caption, counting the decoder start token.
        length_penalty: exponent of the length that divides a caption's summed log-probability.
        early_stopping: True stops once num_beams captions are complete, False when better ones are
            unlikely, "never" only when no better one is possible.
        num_return_sequences: captions to return, best first.
    """

    num_beams: int | None = None
    max_length: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    num_return_sequences: int | None = None


def to_proto(options: GenerationOptions) -> caption_pb2.GenerationOptions:
    """Write the options that are set as a message.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value cannot be sent: no 32-bit integer, or no way of early stopping.
    """
    message = caption_pb2.GenerationOptions()
    for name, value in vars(options).items():
        if value is not None:
            _set(message, name, value)
    return message


def _set(message: caption_pb2.GenerationOptions, name: str, value: object) -> None:
    if name == "early_stopping":
        value = _early_stopping(value)
    try:
        setattr(message, name, value)
    except ValueError as error:
        raise ValueError(f"{name} does not fit a 32-bit integer: {value}") from error
    except TypeError as error:
        raise TypeError(f"{name} has the wrong type: {type(value).__name__}") from error


def _early_stopping(value: object) -> caption_pb2.EarlyStopping.ValueType:
    if not isinstance(value, (bool, str)) or value not in _EARLY_STOPPING:
        raise ValueError(f'early_stopping must be True, False or "never", is {value!r}')
    return _EARLY_STOPPING[value]
