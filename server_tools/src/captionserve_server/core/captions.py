"""What decoding is given and what it gives back, for one image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.history import CaptionHistory
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.words import NO_WORDS, TokenRuns, WordTokens

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
class CheckpointRules:
    """What a checkpoint's generation_config.json wants of every caption and no request can change.

    Names and meanings are transformers'; ids are of the vocabulary.

    Attributes:
        forced_bos_token_id: the token after the start token, unless a prefix is there.
        forced_eos_token_id: one of these is a caption's last token at max_length; empty for any.
        begin_suppress_tokens: not generated as the first token, or as the one after the forced.
        sequence_bias: runs of tokens, and what is added to the score of each one's last where the
            others stand before it.
        exponential_decay_length_penalty: after how many generated tokens the end grows likelier,
            and the base of that growth.
        renormalize_logits: whether the processed scores of beam search are normalised again.
    """

    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    exponential_decay_length_penalty: tuple[int, float] | None = None
    renormalize_logits: bool = False

    @cached_property
    def bias_runs(self) -> TokenRuns:
        """The runs of sequence_bias, laid side by side once and not at each step."""
        return TokenRuns.of([run for run, _ in self.sequence_bias])


NO_RULES = CheckpointRules()


@dataclass(frozen=True)
class CaptionPlan:
    """How one image is to be decoded.

    Attributes:
        options: the decoding options.
        words: the options' words as tokens.
        rules: the checkpoint's own.
    """

    options: DecodingOptions
    words: WordTokens = NO_WORDS
    rules: CheckpointRules = NO_RULES

    @property
    def given_tokens(self) -> int:
        """Tokens before the first generated one: the start token and the prefix."""
        return 1 + len(self.words.prefix)


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
        token_groundings: log-probability of each token with the image less that without it, both
            the model's own; None when not asked for, or when the deadline came first.
        image_state: mean of the image's encoder states, [encoder width]; with token_groundings,
            else empty.
        history: how it came about; None when not asked for.
    """

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    score: float
    finish_reason: FinishReason
    attention: NDArray[np.float32] | None = None
    token_groundings: tuple[float, ...] | None = None
    image_state: tuple[float, ...] = ()
    history: CaptionHistory | None = None

    @property
    def grounding(self) -> float | None:
        """The mean of the tokens' groundings, in nats."""
        found = self.token_groundings
        return None if found is None else math.fsum(found) / len(found)
