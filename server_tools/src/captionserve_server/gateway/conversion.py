"""Between the public API's messages and what the `captioner` model takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from captionserve.v1 import caption_pb2
from numpy.typing import NDArray

from captionserve_server.core import tensors
from captionserve_server.core.errors import ImageMissingError, InvalidOptionsError
from captionserve_server.core.options import EARLY_STOPPING_VALUES, EarlyStopping
from captionserve_server.core.tensors import TensorSpec

EARLY_STOPPING: Mapping[int, EarlyStopping] = {
    caption_pb2.EARLY_STOPPING_FALSE: "false",
    caption_pb2.EARLY_STOPPING_TRUE: "true",
    caption_pb2.EARLY_STOPPING_NEVER: "never",
}
FINISH_REASONS: Mapping[str, caption_pb2.FinishReason.ValueType] = {
    "eos": caption_pb2.FINISH_REASON_EOS,
    "length": caption_pb2.FINISH_REASON_LENGTH,
}


def captioner_inputs(
    request: caption_pb2.CaptionRequest,
) -> dict[TensorSpec, bytes | str | int | float]:
    """The captioner's inputs: the image, and the options that the caller set.

    Raises:
        ImageMissingError: if there is no image.
        InvalidOptionsError: if early_stopping is a number that the API does not name.
    """
    if request.image.WhichOneof("content") is None:
        raise ImageMissingError("the request holds no image")
    inputs: dict[TensorSpec, bytes | str | int | float] = {tensors.IMAGE: request.image.encoded}
    for field, value in request.options.ListFields():
        if field.name == "early_stopping":
            value = _early_stopping(value)
        inputs[tensors.OPTION_TENSORS[field.name]] = value
    return inputs


def _early_stopping(value: int) -> EarlyStopping:
    if value not in EARLY_STOPPING:
        names = ", ".join(EARLY_STOPPING_VALUES)
        raise InvalidOptionsError({"early_stopping": f"must be one of {names}"})
    return EARLY_STOPPING[value]


def caption_response(
    outputs: Mapping[TensorSpec, NDArray[Any]], model_version: int
) -> caption_pb2.CaptionResponse:
    """The response for the captioner's outputs.

    Raises:
        ValueError: if the outputs do not belong together.
        KeyError: if a finish reason is not one of ours.
    """
    rows = zip(
        outputs[tensors.TEXT],
        outputs[tensors.SCORE],
        outputs[tensors.FINISH_REASON],
        outputs[tensors.TOKEN_IDS],
        outputs[tensors.TOKEN_LOGPROBS],
        strict=True,
    )
    captions = [_caption(*row) for row in rows]
    if not captions:
        raise ValueError("no captions")
    return caption_pb2.CaptionResponse(captions=captions, model_version=model_version)


def _caption(
    text: str,
    score: np.float64,
    finish_reason: str,
    token_ids: NDArray[np.int32],
    token_logprobs: NDArray[np.float32],
) -> caption_pb2.Caption:
    real = token_ids != tensors.PADDING_TOKEN_ID
    return caption_pb2.Caption(
        text=text,
        score=float(score),
        token_ids=token_ids[real].tolist(),
        token_logprobs=token_logprobs[real].tolist(),
        finish_reason=FINISH_REASONS[finish_reason],
    )
