"""Every tensor that crosses Triton, named once: name, Triton data type, dims.

tests/contract holds the static config.pbtxt files and the exported graphs to this table.
A dim of -1 varies. Batched models (max_batch_size > 0) leave the batch dim out, as Triton does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DataType = Literal[
    "TYPE_STRING", "TYPE_UINT8", "TYPE_INT32", "TYPE_INT64", "TYPE_FP32", "TYPE_FP64"
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

NUM_BEAMS = TensorSpec("NUM_BEAMS", "TYPE_INT32", (1,), optional=True)
MAX_LENGTH = TensorSpec("MAX_LENGTH", "TYPE_INT32", (1,), optional=True)
LENGTH_PENALTY = TensorSpec("LENGTH_PENALTY", "TYPE_FP64", (1,), optional=True)
EARLY_STOPPING = TensorSpec("EARLY_STOPPING", "TYPE_STRING", (1,), optional=True)
NUM_RETURN_SEQUENCES = TensorSpec("NUM_RETURN_SEQUENCES", "TYPE_INT32", (1,), optional=True)

# Each option is an input of its own, so that Triton's response cache tells requests apart.
OPTION_TENSORS: dict[str, TensorSpec] = {
    "num_beams": NUM_BEAMS,
    "max_length": MAX_LENGTH,
    "length_penalty": LENGTH_PENALTY,
    "early_stopping": EARLY_STOPPING,
    "num_return_sequences": NUM_RETURN_SEQUENCES,
}
"""Field of DecodingOptions to the input tensor that carries it."""

TEXT = TensorSpec("TEXT", "TYPE_STRING", (-1,))
SCORE = TensorSpec("SCORE", "TYPE_FP64", (-1,))
FINISH_REASON = TensorSpec("FINISH_REASON", "TYPE_STRING", (-1,))
TOKEN_IDS = TensorSpec("TOKEN_IDS", "TYPE_INT32", (-1, -1))
"""[captions, longest caption], padded with PADDING_TOKEN_ID."""
TOKEN_LOGPROBS = TensorSpec("TOKEN_LOGPROBS", "TYPE_FP32", (-1, -1))
"""[captions, longest caption], padded with 0."""

PADDING_TOKEN_ID = -1
"""Fills TOKEN_IDS beyond a caption's end; no vocabulary has it."""

CAPTIONER = ModelSpec(
    "captioner",
    inputs=(IMAGE, *OPTION_TENSORS.values()),
    outputs=(TEXT, SCORE, FINISH_REASON, TOKEN_IDS, TOKEN_LOGPROBS),
)

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
NUM_CANDIDATES = TensorSpec("NUM_CANDIDATES", "TYPE_INT64", (1,), optional=True)
"""Candidates wanted per row; for STEP."""

NEW_SLOTS = TensorSpec("NEW_SLOTS", "TYPE_INT64", (-1,))
"""[images], -1 where no slot was free; of PREFILL."""
CANDIDATE_LOGPROBS = TensorSpec("CANDIDATE_LOGPROBS", "TYPE_FP32", (-1, -1))
"""[rows, candidates], descending; of STEP."""
CANDIDATE_TOKENS = TensorSpec("CANDIDATE_TOKENS", "TYPE_INT64", (-1, -1))
"""[rows, candidates]; of STEP."""

DECODER_STEP = ModelSpec(
    "decoder_step",
    inputs=(OPERATION, IMAGE_STATES, SLOTS, ROW_COUNTS, TOKENS, PARENTS, NUM_CANDIDATES),
    outputs=(NEW_SLOTS, CANDIDATE_LOGPROBS, CANDIDATE_TOKENS),
)

MODELS = (CAPTIONER, PREPROCESS, VISION_ENCODER, DECODER_STEP)
