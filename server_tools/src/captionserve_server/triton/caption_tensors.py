"""Captions as the output tensors of `captioner` and `captioner_stream`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from captionserve_server.core.results import FinishedCaption
from captionserve_server.triton import wire
from captionserve_server.triton.pb import Array, response, text_array
from captionserve_server.triton.wire import TensorSpec


def caption_response(captions: Sequence[FinishedCaption], request_id: str) -> Any:
    """A Triton response.

    Args:
        captions: at least one, best first.
        request_id: of the request for which they were computed.
    """
    longest = max(len(caption.token_ids) for caption in captions)
    return response(
        {
            **_texts(captions, longest),
            **_numbers(captions, longest),
            **_attentions(captions, longest),
            wire.COMPUTED_FOR: text_array(request_id),
        }
    )


def _texts(captions: Sequence[FinishedCaption], longest: int) -> dict[TensorSpec, Array]:
    parts = [caption.token_texts for caption in captions]
    padded = [text_array(*own, *[""] * (longest - len(own))) for own in parts]
    return {
        wire.TEXT: text_array(*(caption.text for caption in captions)),
        wire.TOKEN_TEXTS: np.stack(padded),
        wire.FINISH_REASON: text_array(*(caption.finish_reason for caption in captions)),
    }


def _numbers(captions: Sequence[FinishedCaption], longest: int) -> dict[TensorSpec, Array]:
    token_ids = np.full((len(captions), longest), wire.PADDING_TOKEN_ID, np.int32)
    logprobs = np.zeros((len(captions), longest), np.float32)
    for row, caption in enumerate(captions):
        token_ids[row, : len(caption.token_ids)] = caption.token_ids
        logprobs[row, : len(caption.token_ids)] = caption.token_logprobs
    return {
        wire.SCORE: np.array([caption.score for caption in captions], np.float64),
        wire.CONFIDENCE: np.array([caption.confidence for caption in captions], np.float64),
        wire.DEGENERATE: np.array([caption.degenerate for caption in captions], np.bool_),
        wire.TOKEN_IDS: token_ids,
        wire.TOKEN_LOGPROBS: logprobs,
    }


def _attentions(captions: Sequence[FinishedCaption], longest: int) -> dict[TensorSpec, Array]:
    """The attention over the patches; nothing where it was not asked for.

    An empty tensor would keep Triton's response cache from storing the answer.
    """
    grids = [caption.attention for caption in captions if caption.attention is not None]
    if not grids:
        return {}
    attentions = np.zeros((len(captions), longest, *grids[0].shape[1:]), np.float32)
    for number, own in enumerate(grids):
        attentions[number, : len(own)] = own
    return {wire.ATTENTIONS: attentions}
