"""What crosses Triton, named once: tensors, models, and errors as text.

tests/contract holds the static config.pbtxt files and the exported graphs to these tables. A dim of
-1 varies. Batched models (max_batch_size > 0) leave the batch dim out, as Triton does.

This module knows no Triton: the models import it, and so does whoever talks to them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from captionserve_server.core.beams import BeamHistory, BeamStep
from captionserve_server.core.engine.timeline import STAGES
from captionserve_server.core.errors import (
    CaptionServeError,
    InvalidFramingError,
    InvalidOptionsError,
    all_error_types,
)
from captionserve_server.runtime import model_repository

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


# --- The one input message: an image, and how it is to be captioned ------------------------------
IMAGE = TensorSpec("IMAGE", "TYPE_STRING", (1,), optional=True)
"""An encoded image file. Either this or PIXEL_VALUES."""
PIXEL_VALUES = TensorSpec("PIXEL_VALUES", "TYPE_FP32", (3, -1, -1), optional=True)
"""[3, height, width], as the checkpoint's own image processor makes them."""
REGIONS = TensorSpec("REGIONS", "TYPE_INT32", (-1, 4), optional=True)
"""Parts of the image to be captioned beside the whole: left, top, right, bottom in pixels of the
upright image."""
TILES = TensorSpec("TILES", "TYPE_INT32", (2,), optional=True)
"""Rows and columns of a grid over the image, whose cells are captioned likewise, behind REGIONS."""
RESIZE = TensorSpec("RESIZE", "TYPE_STRING", (1,), optional=True)
"""How the image and its parts get the encoder's size, one of RESIZES in core/framing.py; left out,
as the checkpoint does it."""
OPTIONS = TensorSpec("OPTIONS", "TYPE_STRING", (1,), optional=True)
"""Decoding options that the caller sets, a JSON object as transformers' GenerationConfig writes it;
see core/options.py. What it leaves out takes the checkpoint's own default."""

FRAMING = (REGIONS, TILES, RESIZE)
"""What goes with IMAGE only."""
MESSAGE = (IMAGE, PIXEL_VALUES, *FRAMING, OPTIONS)

# --- The answer ----------------------------------------------------------------------------------
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
"""[captions, longest caption, grid rows, grid columns], padded with 0."""
REGION_BOXES = TensorSpec("REGION_BOXES", "TYPE_INT32", (-1, 4))
"""[parts], where each part of the image is, as in REGIONS, which come first, and then the cells of
TILES row by row."""
REGION_CAPTIONS = TensorSpec("REGION_CAPTIONS", "TYPE_INT32", (-1,))
"""[parts], how many captions each part has. In the tensors above, the first captions are those of
the whole image; those of the parts follow, part by part."""

WORD_CONFIDENCES = TensorSpec("WORD_CONFIDENCES", "TYPE_FP64", (-1, -1))
"""[captions, most words], 0 to 1, padded with 0; see `spoken_words` in core/confidence.py."""
REVIEW_REASONS = TensorSpec("REVIEW_REASONS", "TYPE_STRING", (-1,))
"""[captions], why a person should look at it: words with spaces between them; missing where no
caption has a reason."""
TOKEN_GROUNDINGS = TensorSpec("TOKEN_GROUNDINGS", "TYPE_FP32", (-1, -1))
"""[captions, longest caption], padded with 0; missing where not asked for."""

BEAMS = TensorSpec("BEAMS", "TYPE_STRING", (1,))
"""What the search considered, as `beams_text` writes it; missing where not asked for."""
TIMES = TensorSpec("TIMES", "TYPE_FP64", (1 + len(STAGES),))
"""When the decoder took the request, in seconds since 1970, and how many seconds each of its stages
took, in the order of STAGES."""

PADDING_TOKEN_ID = -1
"""Fills TOKEN_IDS beyond a caption's end; no vocabulary has it."""

CAPTIONS = (
    TEXT,
    SCORE,
    FINISH_REASON,
    CONFIDENCE,
    DEGENERATE,
    TOKEN_IDS,
    TOKEN_LOGPROBS,
    TOKEN_TEXTS,
    WORD_CONFIDENCES,
    REVIEW_REASONS,
    ATTENTIONS,
    TOKEN_GROUNDINGS,
    REGION_BOXES,
    REGION_CAPTIONS,
)

ANSWER = (*CAPTIONS, BEAMS, TIMES)
"""What the last response of a request has."""
WHERE_ASKED_FOR = (
    REVIEW_REASONS,
    ATTENTIONS,
    TOKEN_GROUNDINGS,
    REGION_BOXES,
    REGION_CAPTIONS,
    BEAMS,
)
"""Of those, which are missing where they were not asked for, or there is nothing to say."""

NEW_TEXT = TensorSpec("NEW_TEXT", "TYPE_STRING", (1,))
"""The text that has become certain since the last response."""
NEW_TOKEN_IDS = TensorSpec("NEW_TOKEN_IDS", "TYPE_INT32", (-1,))
"""The tokens that have become certain since the last response."""
NEW_BEAM_STEPS = TensorSpec("NEW_BEAM_STEPS", "TYPE_STRING", (1,))
"""What the search has considered since the last response, as `beam_steps_text` writes it; missing
where not asked for."""

PART = (NEW_TEXT, NEW_TOKEN_IDS, NEW_BEAM_STEPS)

CAPTIONER = ModelSpec(model_repository.CAPTIONER, inputs=MESSAGE, outputs=ANSWER)
"""One message in, its captions out."""
CAPTIONER_STREAM = ModelSpec(
    model_repository.CAPTIONER_STREAM, inputs=MESSAGE, outputs=(*PART, *ANSWER)
)
"""Decoupled: each response has either the tensors of PART, or, at the end, those of ANSWER."""

# --- decoder: what the gateway and the fronts ask ------------------------------------------------
STREAM = TensorSpec("STREAM", "TYPE_BOOL", (1,), optional=True)
"""Whether words, and steps of the search, are wanted as they become known, as PART."""
CANCEL = TensorSpec("CANCEL", "TYPE_STRING", (1,), optional=True)
"""The id of a request, for which nobody waits any more. Sent instead of a message, by those whose
own giving up Triton cannot tell the decoder of; answered with an empty response."""
DESCRIBE = TensorSpec("DESCRIBE", "TYPE_BOOL", (1,), optional=True)
"""Sent instead of a message; answered with DESCRIPTION."""
DESCRIPTION = TensorSpec("DESCRIPTION", "TYPE_STRING", (1,))
"""JSON: {"version": number, "defaults": the checkpoint's own options as OPTIONS has them}."""

DECODER = ModelSpec(
    model_repository.DECODER,
    inputs=(*MESSAGE, STREAM, CANCEL, DESCRIBE),
    outputs=(*PART, *ANSWER, DESCRIPTION),
)
"""Decoupled, as CAPTIONER_STREAM."""

# --- vision_encoder: pixels in, hidden states out ------------------------------------------------
PIXELS = TensorSpec("PIXELS", "TYPE_UINT8", (3, -1, -1))
"""RGB, channels first, resized and cropped, 0 to 255."""
ENCODER_STATES = TensorSpec("ENCODER_STATES", "TYPE_FP32", (-1, -1))
"""[image tokens, encoder width]; the class token first."""

VISION_ENCODER = ModelSpec(
    model_repository.VISION_ENCODER, inputs=(PIXELS,), outputs=(ENCODER_STATES,)
)

MODELS = (DECODER, VISION_ENCODER, CAPTIONER, CAPTIONER_STREAM)


def beams_text(beams: BeamHistory) -> str:
    """A history as JSON, with the names of the API; each list has an entry a continuation or token.

    {"steps": [{"parents": [...], "fates": ["kept", ...], ...}, ...], "paths": [{"continuations":
    [...], "likeliest": [{"token_ids": [...], ...}, ...]}, ...]}
    """
    paths = [
        {
            "continuations": path.continuations,
            "likeliest": [
                {
                    "token_ids": [each.token_id for each in tokens],
                    "token_texts": [each.token_text for each in tokens],
                    "token_logprobs": [each.token_logprob for each in tokens],
                }
                for tokens in path.likeliest
            ],
        }
        for path in beams.paths
    ]
    return json.dumps({"steps": _columns(beams.steps), "paths": paths}, allow_nan=False)


def beam_steps_text(steps: Sequence[BeamStep]) -> str:
    """Some steps as JSON: what `beams_text` has as "steps"."""
    return json.dumps(_columns(steps), allow_nan=False)


def _columns(steps: Sequence[BeamStep]) -> list[dict[str, list[object]]]:
    return [
        {
            "parents": [each.parent for each in step],
            "token_ids": [each.token_id for each in step],
            "token_texts": [each.token_text for each in step],
            "token_logprobs": [each.token_logprob for each in step],
            "scores": [each.score for each in step],
            "fates": [each.fate for each in step],
            "beams": [-1 if each.beam is None else each.beam for each in step],
        }
        for step in steps
    ]


def error_text(error: CaptionServeError) -> str:
    """An error as the text of a Triton error, which is all that Triton carries."""
    wire: dict[str, object] = {"reason": error.reason, "message": error.message}
    if error.field_violations:
        wire["field_violations"] = dict(error.field_violations)
    return json.dumps(wire)


def error_of_text(text: str) -> CaptionServeError | None:
    """The error that `error_text` wrote; None when the text is not one of ours."""
    try:
        wire = json.loads(text)
    except ValueError:
        return None
    if not isinstance(wire, dict) or not isinstance(wire.get("message"), str):
        return None
    by_reason = {error_type.reason: error_type for error_type in all_error_types()}
    error_type = by_reason.get(str(wire.get("reason")))
    if error_type is None:
        return None
    if issubclass(error_type, (InvalidFramingError, InvalidOptionsError)):
        violations = wire.get("field_violations")
        return error_type(violations) if _is_text_to_text(violations) else None
    return error_type(wire["message"])


def _is_text_to_text(value: object) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
