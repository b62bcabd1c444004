"""The decoding options a caller may set, and their form on the wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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

    Words are text, which the server tokenises. None leaves an option to the server's checkpoint.
    Ranges are checked by the server, which answers with a CaptionError that names every field at
    fault.

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


def to_proto(options: GenerationOptions) -> caption_pb2.GenerationOptions:
    """Write the options that are set as a message.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value cannot be sent: an integer that is too large, or no way of early
            stopping.
    """
    message = caption_pb2.GenerationOptions()
    for name, value in vars(options).items():
        if value is not None:
            _set(message, name, value)
    return message


def _set(message: caption_pb2.GenerationOptions, name: str, value: object) -> None:
    if name == "early_stopping":
        value = _early_stopping(value)
    field = message.DESCRIPTOR.fields_by_name[name]
    try:
        if field.message_type is None:
            setattr(message, name, value)
        else:
            values = getattr(message, name)
            # An empty list is set too: it is not the checkpoint's default.
            values.SetInParent()
            values.values.extend(_several(value))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} cannot be sent: {value}") from error
    except TypeError as error:
        raise TypeError(f"{name} has the wrong type: {type(value).__name__}") from error


def _several(value: object) -> Sequence[object]:
    # Text is a sequence of letters, which nobody means.
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError("a sequence is wanted")
    return value


def _early_stopping(value: object) -> caption_pb2.EarlyStopping.ValueType:
    if not isinstance(value, (bool, str)) or value not in _EARLY_STOPPING:
        raise ValueError(f'early_stopping must be True, False or "never", is {value!r}')
    return _EARLY_STOPPING[value]
