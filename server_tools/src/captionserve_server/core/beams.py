"""What callers are told of a search: the history that core/history.py keeps, with texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from captionserve_server.core.captions import DecodedCaption
from captionserve_server.core.history import DROPPED, FINISHED, CaptionHistory, HistoryStep

BeamFate = Literal["kept", "dropped", "finished"]

TokenText = Callable[[int], str]
"""The text of a token by itself; empty for special tokens."""


@dataclass(frozen=True)
class Continuation:
    """What a beam might have become at one step.

    Attributes:
        parent: the beam that it continues; at the first step 0, or the first beam of its group.
        token_id: the token that follows.
        token_text: its text; empty for special tokens.
        token_logprob: its natural log-probability, as it was compared.
        score: the sum of the log-probabilities of the beam and the token.
        fate: "kept" as a beam, "dropped", or "finished" as a complete caption, which is returned if
            no better ones are found.
        beam: the beam that it became; None where it was not kept.
    """

    parent: int
    token_id: int
    token_text: str
    token_logprob: float
    score: float
    fate: BeamFate
    beam: int | None


BeamStep = tuple[Continuation, ...]
"""What the beams might have become at one step; in each group of beams the best come first."""


@dataclass(frozen=True)
class LikelyToken:
    """One of the likeliest tokens at a place of a caption.

    Attributes:
        token_id: the token.
        token_text: its text; empty for special tokens.
        token_logprob: its natural log-probability, as the logits processors left it.
    """

    token_id: int
    token_text: str
    token_logprob: float


@dataclass(frozen=True)
class BeamPath:
    """How a caption came about.

    Attributes:
        continuations: of each of its tokens, which of the step's continuations it is.
        likeliest: of each of its tokens, the likeliest at that place; at most 5, likeliest first.
    """

    continuations: tuple[int, ...]
    likeliest: tuple[tuple[LikelyToken, ...], ...]


@dataclass(frozen=True)
class BeamHistory:
    """What a search considered on its way to the captions of an image.

    Attributes:
        steps: of each generated token. Of the continuations that were dropped only the likeliest
            are here: in beam search with the others at most twice as many as beams, else 5 of each
            row.
        paths: of each caption, in the order of the captions.
    """

    steps: tuple[BeamStep, ...]
    paths: tuple[BeamPath, ...]


def beam_history(captions: Sequence[DecodedCaption], text: TokenText) -> BeamHistory | None:
    """What the captions of one image say of their search; None where it was not wanted.

    Args:
        captions: in the order in which they are returned.
        text: of a token.
    """
    histories = [caption.history for caption in captions if caption.history is not None]
    if not histories:
        return None

    def path(history: CaptionHistory) -> BeamPath:
        likeliest = tuple(
            tuple(
                LikelyToken(token, text(token), logprob)
                for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True)
                if logprob > float("-inf")
            )
            for tokens, logprobs in history.likeliest
        )
        return BeamPath(history.path, likeliest)

    return BeamHistory(beam_steps(histories[0].steps, text), tuple(map(path, histories)))


def beam_steps(steps: Sequence[HistoryStep], text: TokenText) -> tuple[BeamStep, ...]:
    """What callers are told of some steps.

    Args:
        steps: one after the other.
        text: of a token.
    """

    def continuations(step: HistoryStep) -> BeamStep:
        columns = step.parents, step.tokens, step.logprobs, step.scores, step.rows
        return tuple(
            Continuation(
                parent=parent,
                token_id=token,
                token_text=text(token),
                token_logprob=logprob,
                score=score,
                fate=_FATES.get(row, "kept"),
                beam=None if row in _FATES else row,
            )
            for parent, token, logprob, score, row in zip(
                *(column.tolist() for column in columns), strict=True
            )
        )

    return tuple(map(continuations, steps))


_FATES: dict[int, BeamFate] = {DROPPED: "dropped", FINISHED: "finished"}
