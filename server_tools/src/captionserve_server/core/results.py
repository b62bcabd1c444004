"""From decoded tokens to what a caller reads: texts, confidence, signs of trouble, attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.beams import BeamHistory, beam_history
from captionserve_server.core.bundle import Bundle
from captionserve_server.core.captions import CaptionPlan, DecodedCaption, FinishReason
from captionserve_server.core.confidence import (
    Evidence,
    SpokenWord,
    is_degenerate,
    spoken_words,
)
from captionserve_server.core.detokenise import Decode, caption_text, token_texts
from captionserve_server.core.updates import Updates

ReviewReason = Literal["low_confidence", "degenerate", "unfinished", "not_grounded"]
"""Why a person should look at a caption: its confidence is below min_confidence, it looks broken,
the deadline came before its end, or the image makes it no likelier than no image does."""


@dataclass(frozen=True)
class CaptionWord:
    """A word of what was generated.

    Attributes:
        text: the word; the part of it that was generated, where a prefix begins it.
        first_token: the first of its tokens, as an index into token_ids.
        tokens: how many it has.
        confidence: how far it can be relied on, 0 to 1.
        grounding: the sum of its tokens' groundings, in nats; None where there are none.
    """

    text: str
    first_token: int
    tokens: int
    confidence: float
    grounding: float | None


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
        words: the words of what was generated, in their order.
        token_groundings: what the image adds to each token's log-probability, in nats; None unless
            output_grounding was set or rerank is by grounding, and where the deadline came first.
        grounding: their mean; None likewise.
        review_reasons: why a person should look at it; none unless min_confidence was set.
        attention: float32 [tokens, grid rows, grid columns], where each token looked; a token's
            values sum to at most 1. None unless output_attentions was set.
        image_state: mean of the image's encoder states, [encoder width]; with token_groundings,
            else empty.
    """

    text: str
    score: float
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    token_texts: tuple[str, ...]
    confidence: float
    degenerate: bool
    words: tuple[CaptionWord, ...]
    token_groundings: tuple[float, ...] | None
    grounding: float | None
    review_reasons: tuple[ReviewReason, ...]
    # Arrays have no single answer to ==.
    attention: NDArray[np.float32] | None = field(compare=False)
    image_state: tuple[float, ...] = field(default=(), repr=False)

    @property
    def needs_review(self) -> bool:
        """Whether a person should look at it."""
        return bool(self.review_reasons)


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
        # Searches consider the same few thousand tokens again and again.
        self._token_text = lru_cache(maxsize=4096)(lambda token: decode([token]))

    def finished(self, caption: DecodedCaption, plan: CaptionPlan) -> FinishedCaption:
        """A caption as its caller reads it.

        Args:
            caption: as it was decoded.
            plan: how it was decoded.
        """
        prefix, token_ids = plan.words.prefix, caption.token_ids
        parts = token_texts(self._decode, prefix, token_ids)
        ended = caption.finish_reason == "eos"
        words = spoken_words(parts)
        evidence = Evidence(
            caption.token_logprobs, words, caption.token_groundings, caption.image_state
        )
        confidence = self._bundle.calibration.caption_confidence(evidence)
        degenerate = is_degenerate([self._decode(prefix), *parts], finished=ended)
        return FinishedCaption(
            text=caption_text(self._decode, [*prefix, *token_ids]),
            score=caption.score,
            token_ids=token_ids,
            token_logprobs=caption.token_logprobs,
            finish_reason=caption.finish_reason,
            token_texts=tuple(parts),
            confidence=confidence,
            degenerate=degenerate,
            words=tuple(self._word(word, evidence) for word in words),
            token_groundings=caption.token_groundings,
            grounding=caption.grounding,
            review_reasons=_review_reasons(
                caption, confidence, plan.options.min_confidence, degenerate=degenerate
            ),
            attention=self._over_patches(caption.attention),
            image_state=caption.image_state,
        )

    def beams(self, captions: Sequence[DecodedCaption]) -> BeamHistory | None:
        """What is told of the search that made captions of one image; None where unwanted."""
        return beam_history(captions, self._token_text)

    def updates(self, plan: CaptionPlan) -> Updates:
        """What is told of a caption while it is decoded."""
        return Updates(plan, self._decode, self._token_text)

    def _word(self, word: SpokenWord, evidence: Evidence) -> CaptionWord:
        groundings = evidence.token_groundings
        return CaptionWord(
            text=word.text,
            first_token=word.first_token,
            tokens=word.tokens,
            confidence=self._bundle.calibration.word_confidence(evidence, word),
            grounding=None if groundings is None else math.fsum(groundings[word.own]),
        )

    def _over_patches(self, attention: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
        """[tokens, image tokens] to [tokens, grid rows, grid columns]."""
        if attention is None:
            return None
        geometry = self._bundle.geometry
        rows, cols = geometry.grid_rows, geometry.grid_cols
        # The patches stand last, behind the class and distillation tokens.
        return attention[:, -rows * cols :].reshape(-1, rows, cols)


def _review_reasons(
    caption: DecodedCaption, confidence: float, min_confidence: float, *, degenerate: bool
) -> tuple[ReviewReason, ...]:
    """Why a person should look at a caption; nothing where no confidence is asked for."""
    if not min_confidence:
        return ()
    reasons: dict[ReviewReason, bool] = {
        "low_confidence": confidence < min_confidence,
        "degenerate": degenerate,
        "unfinished": caption.finish_reason == "deadline",
        "not_grounded": caption.grounding is not None and caption.grounding <= 0,
    }
    return tuple(reason for reason, holds in reasons.items() if holds)
