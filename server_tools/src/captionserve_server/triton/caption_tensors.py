"""Captions as the output tensors of `captioner` and `captioner_stream`."""

from __future__ import annotations

from typing import Any

import numpy as np

from captionserve_server.core import tensors
from captionserve_server.core.bundle import Bundle
from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.detokenise import Decode, caption_text, token_texts
from captionserve_server.core.quality import is_degenerate
from captionserve_server.core.tensors import TensorSpec
from captionserve_server.triton.requests import Array, response, text_array


class CaptionWriter:
    """Writes captions of one checkpoint."""

    def __init__(self, bundle: Bundle, decode: Decode) -> None:
        """Keep what the checkpoint says of texts and confidence.

        Args:
            bundle: the checkpoint.
            decode: token ids to text, without special tokens.
        """
        self._bundle = bundle
        self._decode = decode

    def response(self, captions: list[DecodedCaption], plan: CaptionPlan, request_id: str) -> Any:
        """A Triton response.

        Args:
            captions: at least one, best first.
            plan: how they were decoded.
            request_id: of the request for which they were computed.
        """
        confidence = self._bundle.calibration.confidence
        return response(
            {
                **self._texts(captions, plan.words.prefix),
                **_numbers(captions),
                tensors.CONFIDENCE: np.array(
                    [confidence(caption.token_logprobs) for caption in captions], np.float64
                ),
                **self._attentions(captions),
                tensors.COMPUTED_FOR: text_array(request_id),
            }
        )

    def _texts(
        self, captions: list[DecodedCaption], prefix: tuple[int, ...]
    ) -> dict[TensorSpec, Array]:
        longest = max(len(caption.token_ids) for caption in captions)
        texts = [caption_text(self._decode, [*prefix, *caption.token_ids]) for caption in captions]
        parts = [token_texts(self._decode, prefix, caption.token_ids) for caption in captions]
        padded = [text_array(*own, *[""] * (longest - len(own))) for own in parts]
        given = self._decode(prefix)
        degenerate = [
            is_degenerate([given, *own], finished=caption.finish_reason == "eos")
            for own, caption in zip(parts, captions, strict=True)
        ]
        return {
            tensors.TEXT: text_array(*texts),
            tensors.TOKEN_TEXTS: np.stack(padded),
            tensors.DEGENERATE: np.array(degenerate, np.bool_),
        }

    def _attentions(self, captions: list[DecodedCaption]) -> dict[TensorSpec, Array]:
        """The attention over the patches; nothing where it was not asked for.

        An empty tensor would keep Triton's response cache from storing the answer.
        """
        if captions[0].attention is None:
            return {}
        geometry = self._bundle.geometry
        rows, cols = geometry.grid_rows, geometry.grid_cols
        longest = max(len(caption.token_ids) for caption in captions)
        attentions = np.zeros((len(captions), longest, rows, cols), np.float32)
        for number, caption in enumerate(captions):
            assert caption.attention is not None
            # The patches stand last, behind the class and distillation tokens.
            patches = caption.attention[:, -rows * cols :]
            attentions[number, : len(patches)] = patches.reshape(-1, rows, cols)
        return {tensors.ATTENTIONS: attentions}


def _numbers(captions: list[DecodedCaption]) -> dict[TensorSpec, Array]:
    longest = max(len(caption.token_ids) for caption in captions)
    token_ids = np.full((len(captions), longest), tensors.PADDING_TOKEN_ID, np.int32)
    logprobs = np.zeros((len(captions), longest), np.float32)
    for row, caption in enumerate(captions):
        token_ids[row, : len(caption.token_ids)] = caption.token_ids
        logprobs[row, : len(caption.token_ids)] = caption.token_logprobs
    return {
        tensors.SCORE: np.array([caption.score for caption in captions], np.float64),
        tensors.FINISH_REASON: text_array(*(caption.finish_reason for caption in captions)),
        tensors.TOKEN_IDS: token_ids,
        tensors.TOKEN_LOGPROBS: logprobs,
    }
