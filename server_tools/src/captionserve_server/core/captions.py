"""What decoding is given and what it gives back, for one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.words import NO_WORDS, WordTokens

FinishReason = Literal["eos", "length", "deadline"]


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning to decoding.

    Attributes:
        start: the decoder start token.
        end: tokens that end a caption.
    """

    start: int
    end: tuple[int, ...]


@dataclass(frozen=True)
class CaptionPlan:
    """How one image is to be decoded.

    Attributes:
        options: the decoding options.
        words: the options' words as tokens.
    """

    options: DecodingOptions
    words: WordTokens = NO_WORDS


@dataclass(frozen=True)
class DecodedCaption:
    """One finished caption.

    Attributes:
        token_ids: generated tokens, without start token and prefix, with the end token if produced.
        token_logprobs: natural log-probability of each, as the logits processors left it.
        score: sum(token_logprobs) / len(token_ids) ** length_penalty.
        finish_reason: "eos", "length", or "deadline" for the best so far.
        attention: float32 [tokens, image tokens], mean over layers and heads of the cross-attention
            that chose each token; None when not asked for.
    """

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    score: float
    finish_reason: FinishReason
    attention: NDArray[np.float32] | None = None
