"""From decoded tokens to what a caller reads: texts, confidence, signs of trouble, attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.beams import BeamHistory, beam_history
from captionserve_server.core.bundle import Bundle
from captionserve_server.core.captions import CaptionPlan, DecodedCaption, FinishReason
from captionserve_server.core.confidence import is_degenerate
from captionserve_server.core.detokenise import Decode, caption_text, token_texts


@dataclass(frozen=True)
class FinishedCaption:
    """One description of an image.

    Attributes:
        text: the caption, the prefix included, without special tokens.
        score: sum(token_logprobs) / len(token_ids) ** length_penalty; higher is better.
        token_ids: the generated tokens: without the decoder start token and the prefix, with the
            end token if it was produced.
        token_logprobs: natural log-probability of each token of token_ids.
        finish_reason: "eos", "length" or "deadline".
        token_texts: each token's part of the text; empty for special tokens.
        confidence: how far the caption can be relied on, 0 to 1.
        degenerate: whether it looks broken: it runs in circles, or ends within a word.
        attention: float32 [tokens, grid rows, grid columns], where each token looked; a token's
            values sum to at most 1. None unless output_attentions was set.
    """

    text: str
    score: float
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    token_texts: tuple[str, ...]
    confidence: float
    degenerate: bool
    # Arrays have no single answer to ==.
    attention: NDArray[np.float32] | None = field(compare=False)


class Finisher:
    """Finishes captions of one checkpoint."""

    def __init__(self, bundle: Bundle, decode: Decode) -> None:
        """Keep what the checkpoint says of texts and confidence.

        Args:
            bundle: the checkpoint.
            decode: token ids to text, without special tokens.
        """
        self._bundle = bundle
        self._decode = decode

    def finished(self, caption: DecodedCaption, plan: CaptionPlan) -> FinishedCaption:
        """A caption as its caller reads it.

        Args:
            caption: as it was decoded.
            plan: how it was decoded.
        """
        prefix, token_ids = plan.words.prefix, caption.token_ids
        parts = token_texts(self._decode, prefix, token_ids)
        ended = caption.finish_reason == "eos"
        return FinishedCaption(
            text=caption_text(self._decode, [*prefix, *token_ids]),
            score=caption.score,
            token_ids=token_ids,
            token_logprobs=caption.token_logprobs,
            finish_reason=caption.finish_reason,
            token_texts=tuple(parts),
            confidence=self._bundle.calibration.confidence(caption.token_logprobs),
            degenerate=is_degenerate([self._decode(prefix), *parts], finished=ended),
            attention=self._over_patches(caption.attention),
        )

    def beams(self, captions: Sequence[DecodedCaption]) -> BeamHistory | None:
        """What is told of the search that made captions of one image; None where unwanted."""
        return beam_history(captions, self._decode)

    def _over_patches(self, attention: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """[tokens, image tokens] to [tokens, grid rows, grid columns]."""
        if attention is None:
            return None
        geometry = self._bundle.geometry
        rows, cols = geometry.grid_rows, geometry.grid_cols
        # The patches stand last, behind the class and distillation tokens.
        return attention[:, -rows * cols :].reshape(-1, rows, cols)
