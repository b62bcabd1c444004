"""Between the public API's messages and what the `captioner` models take and give."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from captionserve.v1 import caption_pb2
from numpy.typing import NDArray

from captionserve_server.core.errors import ImageMissingError, InvalidOptionsError
from captionserve_server.core.options import EARLY_STOPPING_VALUES, MAX_SEED, EarlyStopping
from captionserve_server.gateway.kserve import Element
from captionserve_server.triton import wire
from captionserve_server.triton.wire import TensorSpec

Inputs = dict[TensorSpec, Sequence[Element]]
Outputs = Mapping[TensorSpec, NDArray[Any]]

EARLY_STOPPING: Mapping[int, EarlyStopping] = {
    caption_pb2.EARLY_STOPPING_FALSE: "false",
    caption_pb2.EARLY_STOPPING_TRUE: "true",
    caption_pb2.EARLY_STOPPING_NEVER: "never",
}
FINISH_REASONS: Mapping[str, caption_pb2.FinishReason.ValueType] = {
    "eos": caption_pb2.FINISH_REASON_EOS,
    "length": caption_pb2.FINISH_REASON_LENGTH,
    "deadline": caption_pb2.FINISH_REASON_DEADLINE,
}


def captioner_inputs(request: caption_pb2.CaptionRequest) -> Inputs:
    """The captioner's inputs: the image, and the options that the caller set.

    Raises:
        ImageMissingError: if there is no image.
        InvalidOptionsError: if early_stopping is a number that the API does not name.
    """
    if request.image.WhichOneof("content") is None:
        raise ImageMissingError("the request holds no image")
    inputs: Inputs = {wire.IMAGE: [request.image.encoded]}
    for field, value in request.options.ListFields():
        if field.name == "early_stopping":
            value = _early_stopping(value)
        inputs[wire.OPTION_TENSORS[field.name]] = list(value) if field.is_repeated else [value]
    return inputs


def nonce_if_needed(request: caption_pb2.CaptionRequest) -> Inputs:
    """What keeps an answer out of the response cache, where it must not come from there."""
    options = request.options
    seedless = options.do_sample and not options.HasField("seed")
    return nonce() if request.bypass_cache or options.allow_partial or seedless else {}


def nonce() -> Inputs:
    """What sets a request apart from all others, so that no cache answers it."""
    return {wire.NONCE: [secrets.randbelow(MAX_SEED)]}


def _early_stopping(value: int) -> EarlyStopping:
    if value not in EARLY_STOPPING:
        names = ", ".join(EARLY_STOPPING_VALUES)
        raise InvalidOptionsError({"early_stopping": f"must be one of {names}"})
    return EARLY_STOPPING[value]


def caption_part(outputs: Outputs) -> caption_pb2.CaptionPart:
    """A part of a caption; LookupError where an output is missing."""
    return caption_pb2.CaptionPart(
        text=outputs[wire.NEW_TEXT][0], token_ids=outputs[wire.NEW_TOKEN_IDS].tolist()
    )


def caption_response(
    outputs: Outputs, *, model_version: int, request_id: str
) -> caption_pb2.CaptionResponse:
    """The response for the captioner's outputs.

    Args:
        outputs: what the model gave.
        model_version: which one it was.
        request_id: of the request; one that was computed for another was there already.

    Raises:
        ValueError: if the outputs do not belong together.
        LookupError: if an output is missing or too short, or a finish reason is not one of ours.
    """
    columns = [outputs[spec] for spec in _CAPTION_COLUMNS]
    captions = [
        _caption(dict(zip(_CAPTION_COLUMNS, row, strict=True)))
        for row in zip(*columns, strict=True)
    ]
    if not captions:
        raise ValueError("no captions")
    _add_attention(captions, outputs)
    return caption_pb2.CaptionResponse(
        captions=captions,
        model_version=model_version,
        cached=outputs[wire.COMPUTED_FOR][0] != request_id,
    )


# One entry, or row, for each caption.
_CAPTION_COLUMNS = (
    wire.TEXT,
    wire.SCORE,
    wire.FINISH_REASON,
    wire.CONFIDENCE,
    wire.DEGENERATE,
    wire.TOKEN_IDS,
    wire.TOKEN_LOGPROBS,
    wire.TOKEN_TEXTS,
)


def _caption(row: Mapping[TensorSpec, Any]) -> caption_pb2.Caption:
    real = row[wire.TOKEN_IDS] != wire.PADDING_TOKEN_ID
    return caption_pb2.Caption(
        text=row[wire.TEXT],
        score=float(row[wire.SCORE]),
        token_ids=row[wire.TOKEN_IDS][real].tolist(),
        token_logprobs=row[wire.TOKEN_LOGPROBS][real].tolist(),
        token_texts=row[wire.TOKEN_TEXTS][real].tolist(),
        finish_reason=FINISH_REASONS[row[wire.FINISH_REASON]],
        confidence=float(row[wire.CONFIDENCE]),
        degenerate=bool(row[wire.DEGENERATE]),
    )


def _add_attention(captions: Iterable[caption_pb2.Caption], outputs: Outputs) -> None:
    if wire.ATTENTIONS not in outputs:
        return
    for caption, attention in zip(captions, outputs[wire.ATTENTIONS], strict=True):
        grids: NDArray[np.float32] = attention[: len(caption.token_ids)]
        if len(grids) < len(caption.token_ids):
            raise ValueError("attention is missing")
        caption.attention.rows, caption.attention.cols = grids.shape[1:]
        caption.attention.values.extend(grids.ravel().tolist())
