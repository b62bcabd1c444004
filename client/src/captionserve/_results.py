"""What a call returns: immutable values without any trace of the wire."""

from __future__ import annotations

import dataclasses
import enum

from captionserve.v1 import caption_pb2


class FinishReason(str, enum.Enum):
    """Why a caption ended."""

    EOS = "eos"
    """The end token was produced."""
    LENGTH = "length"
    """max_length was reached."""
    UNKNOWN = "unknown"
    """The server gave no reason that this client knows."""

    __str__ = str.__str__


_FINISH_REASONS: dict[int, FinishReason] = {
    caption_pb2.FINISH_REASON_EOS: FinishReason.EOS,
    caption_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


@dataclasses.dataclass(frozen=True)
class Caption:
    """One description of an image.

    Attributes:
        text: the caption, without special tokens.
        score: sum(token_logprobs) / len(token_ids) ** length_penalty; higher is better.
        token_ids: the generated tokens: without the decoder start token and padding, with the end
            token if it was produced.
        token_logprobs: natural log-probability of each token of token_ids.
        finish_reason: why the caption ended.
    """

    text: str
    score: float
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True)
class CaptionResult:
    """The captions of one image.

    Attributes:
        captions: at least one, best first.
        model_version: the version of the model that answered.
    """

    captions: tuple[Caption, ...]
    model_version: int

    @property
    def text(self) -> str:
        """The best caption's text."""
        return self.captions[0].text


def from_proto(response: caption_pb2.CaptionResponse) -> CaptionResult:
    """Read a response."""
    return CaptionResult(
        captions=tuple(_caption(message) for message in response.captions),
        model_version=response.model_version,
    )


def _caption(message: caption_pb2.Caption) -> Caption:
    return Caption(
        text=message.text,
        score=message.score,
        token_ids=tuple(message.token_ids),
        token_logprobs=tuple(message.token_logprobs),
        finish_reason=_FINISH_REASONS.get(message.finish_reason, FinishReason.UNKNOWN),
    )
