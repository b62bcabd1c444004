"""Every tensor that crosses Triton, named once: name, Triton data type, dims.

tests/contract holds the static config.pbtxt files and the exported graphs to this table.
A dim of -1 varies. Batched models (max_batch_size > 0) leave the batch dim out, as Triton does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DataType = Literal[
    "TYPE_STRING",
    "TYPE_BOOL",
    "TYPE_UINT8",
    "TYPE_INT32",
    "TYPE_INT64",
    "TYPE_FP32",
    "TYPE_FP64",
]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a Triton model.

    Attributes:
        name: the tensor's name.
        data_type: Triton's name for the element type.
        dims: the shape without the batch dim of a batched model; -1 varies.
        optional: whether an input may be left out.
    """

    name: str
    data_type: DataType
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A Triton model's interface."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


# --- captioner: one image in, its captions out -----------------------------------------------
IMAGE = TensorSpec("IMAGE", "TYPE_STRING", (1,))
"""An encoded image file."""

# Type and elements of an option's tensor; its name is the option's in upper case. Each option is an
# input of its own, so that Triton's response cache tells requests apart.
_OPTION_TYPES: dict[str, tuple[DataType, int]] = {
    "num_beams": ("TYPE_INT32", 1),
    "max_length": ("TYPE_INT32", 1),
    "min_length": ("TYPE_INT32", 1),
    "length_penalty": ("TYPE_FP64", 1),
    "early_stopping": ("TYPE_STRING", 1),
    "num_return_sequences": ("TYPE_INT32", 1),
    "do_sample": ("TYPE_BOOL", 1),
    "temperature": ("TYPE_FP64", 1),
    "top_k": ("TYPE_INT32", 1),
    "top_p": ("TYPE_FP64", 1),
    "min_p": ("TYPE_FP64", 1),
    "seed": ("TYPE_INT64", 1),
    "num_beam_groups": ("TYPE_INT32", 1),
    "diversity_penalty": ("TYPE_FP64", 1),
    "repetition_penalty": ("TYPE_FP64", 1),
    "no_repeat_ngram_size": ("TYPE_INT32", 1),
    "bad_words": ("TYPE_STRING", -1),
    "force_words": ("TYPE_STRING", -1),
    "prefix": ("TYPE_STRING", 1),
    "suppress_tokens": ("TYPE_INT32", -1),
    "output_attentions": ("TYPE_BOOL", 1),
    "allow_partial": ("TYPE_BOOL", 1),
}

OPTION_TENSORS: dict[str, TensorSpec] = {
    name: TensorSpec(name.upper(), data_type, (elements,), optional=True)
    for name, (data_type, elements) in _OPTION_TYPES.items()
}
"""Field of DecodingOptions to the input tensor that carries it."""

NONCE = TensorSpec("NONCE", "TYPE_INT64", (1,), optional=True)
"""A number of the caller's own, different for each request whose answer must not be taken from
Triton's response cache. Required where the answer is not reproducible."""

TEXT = TensorSpec("TEXT", "TYPE_STRING", (-1,))
"""[captions], the prefix included."""
SCORE = TensorSpec("SCORE", "TYPE_FP64", (-1,))
FINISH_REASON = TensorSpec("FINISH_REASON", "TYPE_STRING", (-1,))
CONFIDENCE = TensorSpec("CONFIDENCE", "TYPE_FP64", (-1,))
"""[captions], 0 to 1."""
DEGENERATE = TensorSpec("DEGENERATE", "TYPE_BOOL", (-1,))
TOKEN_IDS = TensorSpec("TOKEN_IDS", "TYPE_INT32", (-1, -1))
"""[captions, longest caption], padded with PADDING_TOKEN_ID."""
TOKEN_LOGPROBS = TensorSpec("TOKEN_LOGPROBS", "TYPE_FP32", (-1, -1))
"""[captions, longest caption], padded with 0."""
TOKEN_TEXTS = TensorSpec("TOKEN_TEXTS", "TYPE_STRING", (-1, -1))
"""[captions, longest caption], each token's part of the text, padded with empty strings."""
ATTENTIONS = TensorSpec("ATTENTIONS", "TYPE_FP32", (-1, -1, -1, -1))
"""[captions, longest caption, grid rows, grid columns], padded with 0; missing where not
asked for."""
COMPUTED_FOR = TensorSpec("COMPUTED_FOR", "TYPE_STRING", (1,))
"""The id of the request for which the answer was computed; another request's when it comes from the
response cache, or from an identical request in flight."""

PADDING_TOKEN_ID = -1
"""Fills TOKEN_IDS beyond a caption's end; no vocabulary has it."""

_CAPTIONER_INPUTS = (IMAGE, *OPTION_TENSORS.values(), NONCE)
_CAPTION_OUTPUTS = (
    TEXT,
    SCORE,
    FINISH_REASON,
    CONFIDENCE,
    DEGENERATE,
    TOKEN_IDS,
    TOKEN_LOGPROBS,
    TOKEN_TEXTS,
    ATTENTIONS,
    COMPUTED_FOR,
)

CAPTIONER = ModelSpec("captioner", inputs=_CAPTIONER_INPUTS, outputs=_CAPTION_OUTPUTS)

# --- captioner_stream: the same, with the words as they become certain ---------------------------
NEW_TEXT = TensorSpec("NEW_TEXT", "TYPE_STRING", (1,))
"""The text that has become certain since the last response."""
NEW_TOKEN_IDS = TensorSpec("NEW_TOKEN_IDS", "TYPE_INT32", (-1,))
"""The tokens that have become certain since the last response."""

CAPTIONER_STREAM = ModelSpec(
    "captioner_stream",
    inputs=_CAPTIONER_INPUTS,
    outputs=(NEW_TEXT, NEW_TOKEN_IDS, *_CAPTION_OUTPUTS),
)
"""Decoupled: each response has either NEW_TEXT and NEW_TOKEN_IDS, or, at the end, the captions."""

# --- preprocess: an encoded image in, the encoder's pixels out ---------------------------------
PIXELS = TensorSpec("PIXELS", "TYPE_UINT8", (3, -1, -1))
"""RGB, channels first, resized and cropped, 0 to 255."""

PREPROCESS = ModelSpec("preprocess", inputs=(IMAGE,), outputs=(PIXELS,))

# --- vision_encoder: pixels in, hidden states out ----------------------------------------------
ENCODER_STATES = TensorSpec("ENCODER_STATES", "TYPE_FP32", (-1, -1))
"""[image tokens, encoder width]; the class token first."""

VISION_ENCODER = ModelSpec("vision_encoder", inputs=(PIXELS,), outputs=(ENCODER_STATES,))

# --- decoder_step: owns the key/value slots ------------------------------------------------------
OPERATION = TensorSpec("OPERATION", "TYPE_STRING", (1,))
"""PREFILL, STEP or FREE; see triton/decoder_step.py."""
OWNER = TensorSpec("OWNER", "TYPE_STRING", (1,))
"""role/instance of the caller, such as captioner/5f3a; a new instance inherits no slots."""
IMAGE_STATES = TensorSpec("IMAGE_STATES", "TYPE_FP32", (-1, -1, -1), optional=True)
"""[images, image tokens, encoder width]; for PREFILL."""
SLOTS = TensorSpec("SLOTS", "TYPE_INT64", (-1,), optional=True)
"""[captions]; for STEP and FREE."""
ROW_COUNTS = TensorSpec("ROW_COUNTS", "TYPE_INT64", (-1,), optional=True)
"""[captions], rows (live beams) of each; for STEP."""
TOKENS = TensorSpec("TOKENS", "TYPE_INT64", (-1,), optional=True)
"""[rows], the newest token of each row; for STEP."""
PARENTS = TensorSpec("PARENTS", "TYPE_INT64", (-1,), optional=True)
"""[rows], which row of its caption's previous step each row continues; for STEP."""
CANDIDATE_COUNTS = TensorSpec("CANDIDATE_COUNTS", "TYPE_INT64", (-1,), optional=True)
"""[rows], candidates wanted for each; for STEP."""
NORMALISE_FIRST = TensorSpec("NORMALISE_FIRST", "TYPE_BOOL", (-1,), optional=True)
"""[rows], whether edits act on log-probabilities rather than on logits; for STEP."""
EDIT_ROWS = TensorSpec("EDIT_ROWS", "TYPE_INT64", (-1,), optional=True)
"""[edits], the row of each changed score; for STEP, as the next two."""
EDIT_TOKENS = TensorSpec("EDIT_TOKENS", "TYPE_INT64", (-1,), optional=True)
"""[edits], its token."""
EDIT_FACTORS = TensorSpec("EDIT_FACTORS", "TYPE_FP32", (-1,), optional=True)
"""[edits], how much worse it gets; infinity forbids the token."""
PROBE_ROWS = TensorSpec("PROBE_ROWS", "TYPE_INT64", (-1,), optional=True)
"""[probes], rows of which one token's log-probability is wanted; for STEP, as the next."""
PROBE_TOKENS = TensorSpec("PROBE_TOKENS", "TYPE_INT64", (-1,), optional=True)
"""[probes], its token."""
ATTENTION_ROWS = TensorSpec("ATTENTION_ROWS", "TYPE_INT64", (-1,), optional=True)
"""[attended], rows of which the cross-attention is wanted; for STEP."""

NEW_SLOTS = TensorSpec("NEW_SLOTS", "TYPE_INT64", (-1,))
"""[images], -1 where no slot was free; of PREFILL."""
CANDIDATE_LOGPROBS = TensorSpec("CANDIDATE_LOGPROBS", "TYPE_FP32", (-1,))
"""Each row's candidates, descending, one row after the other; of STEP."""
CANDIDATE_TOKENS = TensorSpec("CANDIDATE_TOKENS", "TYPE_INT64", (-1,))
"""Likewise."""
PROBE_LOGPROBS = TensorSpec("PROBE_LOGPROBS", "TYPE_FP32", (-1,))
"""[probes]; of STEP."""
ATTENTION = TensorSpec("ATTENTION", "TYPE_FP32", (-1, -1))
"""[attended, image tokens]; of STEP."""

STEP_ROW_INPUTS = (SLOTS, ROW_COUNTS, TOKENS, PARENTS, CANDIDATE_COUNTS, NORMALISE_FIRST)
"""What every STEP has."""
STEP_EXTRA_INPUTS = (
    EDIT_ROWS,
    EDIT_TOKENS,
    EDIT_FACTORS,
    PROBE_ROWS,
    PROBE_TOKENS,
    ATTENTION_ROWS,
)
"""What is left out where it has no elements; likewise the outputs."""
STEP_OUTPUTS = (CANDIDATE_LOGPROBS, CANDIDATE_TOKENS, PROBE_LOGPROBS, ATTENTION)

DECODER_STEP = ModelSpec(
    "decoder_step",
    inputs=(OPERATION, OWNER, IMAGE_STATES, *STEP_ROW_INPUTS, *STEP_EXTRA_INPUTS),
    outputs=(NEW_SLOTS, *STEP_OUTPUTS),
)

MODELS = (CAPTIONER, CAPTIONER_STREAM, PREPROCESS, VISION_ENCODER, DECODER_STEP)
