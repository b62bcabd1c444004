"""What a call returns: immutable values without any trace of the wire."""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from captionserve._alt_text import (
    DEFAULT_HEDGE_BELOW,
    DEFAULT_MAX_CHARS,
    AltText,
    alt_text_of,
)
from captionserve._options import options_from_proto
from captionserve.v1 import caption_pb2


class FinishReason(str, enum.Enum):
    """Why a caption ended."""

    EOS = "eos"
    """The end token was produced."""
    LENGTH = "length"
    """max_length was reached."""
    DEADLINE = "deadline"
    """The deadline came first, and allow_partial was set."""
    UNKNOWN = "unknown"
    """The server gave no reason that this client knows."""

    __str__ = str.__str__


_FINISH_REASONS: dict[int, FinishReason] = {
    caption_pb2.FINISH_REASON_EOS: FinishReason.EOS,
    caption_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    caption_pb2.FINISH_REASON_DEADLINE: FinishReason.DEADLINE,
}


class ReviewReason(str, enum.Enum):
    """Why a person should look at a caption."""

    LOW_CONFIDENCE = "low_confidence"
    """Its confidence is below min_confidence."""
    DEGENERATE = "degenerate"
    """It looks broken."""
    UNFINISHED = "unfinished"
    """The deadline came before its end."""
    NOT_GROUNDED = "not_grounded"
    """The image makes it no likelier than no image does."""
    UNKNOWN = "unknown"
    """The server gave a reason that this client does not know."""

    __str__ = str.__str__


_REVIEW_REASONS: dict[int, ReviewReason] = {
    caption_pb2.REVIEW_REASON_LOW_CONFIDENCE: ReviewReason.LOW_CONFIDENCE,
    caption_pb2.REVIEW_REASON_DEGENERATE: ReviewReason.DEGENERATE,
    caption_pb2.REVIEW_REASON_UNFINISHED: ReviewReason.UNFINISHED,
    caption_pb2.REVIEW_REASON_NOT_GROUNDED: ReviewReason.NOT_GROUNDED,
}


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a caption: a run of letters, digits, underscores, apostrophes and hyphens.

    Attributes:
        text: the word; the part of it that was generated, where a prefix begins it.
        first_token: the first of its tokens, as an index into token_ids.
        tokens: how many it has.
        confidence: how far it can be relied on, 0 to 1.
        grounding: the sum of its tokens' groundings; None where there are none.
    """

    text: str
    first_token: int
    tokens: int
    confidence: float
    grounding: float | None


@dataclasses.dataclass(frozen=True)
class Attention:
    """Where in the image each token looked: cross-attention over the grid of patches.

    Attributes:
        rows: rows of the grid.
        cols: columns of the grid.
        values: [tokens, rows, cols] flattened in that order; a token's values sum to at most 1.
    """

    rows: int
    cols: int
    values: tuple[float, ...]

    def grid(self, token: int) -> list[list[float]]:
        """One token's values as rows of columns.

        Raises:
            IndexError: if there is no such token.
        """
        size = self.rows * self.cols
        if not 0 <= token * size < len(self.values):
            raise IndexError(f"there is no token {token}")
        begins = range(token * size, (token + 1) * size, self.cols)
        return [list(self.values[begin : begin + self.cols]) for begin in begins]


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
        token_texts: each token's part of the text; empty for special tokens.
        confidence: how far the caption can be relied on, 0 to 1.
        degenerate: whether it looks broken: it runs in circles, or ends within a word.
        attention: where each token looked; None unless output_attentions was set.
        words: the words of what was generated, in their order, each with its own confidence.
        token_groundings: what the image adds to the log-probability of each token of token_ids, in
            nats; None unless output_grounding was set or rerank is "grounding", and where the
            deadline came first.
        grounding: their mean; None likewise.
        needs_review: whether a person should look at it; False unless min_confidence was set.
        review_reasons: why.
    """

    text: str
    score: float
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    token_texts: tuple[str, ...]
    confidence: float
    degenerate: bool
    attention: Attention | None
    words: tuple[Word, ...] = ()
    token_groundings: tuple[float, ...] | None = None
    grounding: float | None = None
    needs_review: bool = False
    review_reasons: tuple[ReviewReason, ...] = ()


class BeamFate(str, enum.Enum):
    """What became of a beam's continuation."""

    KEPT = "kept"
    """It went on as a beam."""
    DROPPED = "dropped"
    """Others were better, or the search had ended."""
    FINISHED = "finished"
    """It was a complete caption, returned if no better ones were found."""
    UNKNOWN = "unknown"
    """The server named a fate that this client does not know."""

    __str__ = str.__str__


_BEAM_FATES: dict[int, BeamFate] = {
    caption_pb2.BEAM_FATE_KEPT: BeamFate.KEPT,
    caption_pb2.BEAM_FATE_DROPPED: BeamFate.DROPPED,
    caption_pb2.BEAM_FATE_FINISHED: BeamFate.FINISHED,
}


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What a beam might have become at one step.

    Attributes:
        parent: the beam that it continues; at the first step 0, or the first beam of its group.
        token_id: the token that follows.
        token_text: its text; empty for special tokens.
        token_logprob: its natural log-probability, as it was compared.
        score: the sum of the log-probabilities of the beam and the token.
        fate: what became of it.
        beam: the beam that it became; None where it was not kept.
    """

    parent: int
    token_id: int
    token_text: str
    token_logprob: float
    score: float
    fate: BeamFate
    beam: int | None


BeamStep: TypeAlias = tuple[Continuation, ...]
"""What the beams might have become at one step; in each group of beams the best come first."""


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class BeamPath:
    """How a caption came about.

    Attributes:
        continuations: of each of its tokens, which of the step's continuations it is.
        likeliest: of each of its tokens, the likeliest at that place; at most 5, likeliest first.
    """

    continuations: tuple[int, ...]
    likeliest: tuple[tuple[LikelyToken, ...], ...]


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the way of a request.

    Attributes:
        name: of the stage, as docs/metrics.md explains it.
        milliseconds: how long it took.
    """

    name: str
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class DescribedRegion:
    """The captions of a part of an image.

    Attributes:
        box: left, top, right and bottom, in pixels of the upright image.
        captions: as those of an image of its own, best first; none where allow_partial was set and
            the deadline came before the first word.
    """

    box: tuple[int, int, int, int]
    captions: tuple[Caption, ...]

    @property
    def text(self) -> str:
        """The best caption's text; empty where there is none."""
        return self.captions[0].text if self.captions else ""


@dataclasses.dataclass(frozen=True)
class CaptionResult:
    """The captions of one image.

    Attributes:
        captions: of the whole image; at least one, best first.
        model_version: the version of the model that answered.
        cached: whether the answer was there already, or was computed for an identical request.
        regions: the parts that were asked for: the regions, then the tiles row by row.
        beams: what the search considered; None unless output_beams was set.
        stages: how long each stage took, in their order; empty unless output_stages was set, and
            for what was there already.
    """

    captions: tuple[Caption, ...]
    model_version: int
    cached: bool
    regions: tuple[DescribedRegion, ...] = ()
    beams: BeamHistory | None = None
    stages: tuple[Stage, ...] = ()

    @property
    def text(self) -> str:
        """The best caption's text."""
        return self.captions[0].text

    def alt_text(
        self,
        max_chars: int = DEFAULT_MAX_CHARS,
        nearby_text: str | None = None,
        file_name: str | os.PathLike[str] | None = None,
        hedge_below: float = DEFAULT_HEDGE_BELOW,
    ) -> AltText:
        """A draft of an alternative text, made of the best caption; a person decides on it.

        Args:
            max_chars: code points that it may have; it ends with a whole word, without the
                beginning of a phrase.
            nearby_text: what is to be read beside the image, such as its legend, so that a
                repetition of it is warned of.
            file_name: the image's, or its path, so that an alt text that is just this is warned of.
            hedge_below: a caption of less confidence, 0 to 1, begins with "Possibly"; 0 for none.

        Raises:
            TypeError: if max_chars is no whole number.
            ValueError: if it is below 1, or hedge_below not from 0 to 1.
        """
        return alt_text_of(self.captions[0], max_chars, nearby_text, file_name, hedge_below)


def from_proto(response: caption_pb2.CaptionResponse) -> CaptionResult:
    """Read a response."""
    return CaptionResult(
        captions=tuple(_caption(message) for message in response.captions),
        model_version=response.model_version,
        cached=response.cached,
        regions=tuple(map(_region, response.regions)),
        beams=_beams(response.beams) if response.HasField("beams") else None,
        stages=tuple(Stage(each.name, each.milliseconds) for each in response.stages),
    )


@dataclasses.dataclass(frozen=True)
class CaptionUpdate:
    """What has become known of a caption that is being decoded.

    Attributes:
        text: the text that follows that of the last update; all of them together are the caption.
        token_ids: its tokens.
        result: the whole result; only in the last update, which has nothing else.
        beam_steps: the steps of the search since the last update; all of them together are those of
            result.beams. Empty unless output_beams was set.
    """

    text: str
    token_ids: tuple[int, ...]
    result: CaptionResult | None
    beam_steps: tuple[BeamStep, ...] = ()


def update_from_proto(response: caption_pb2.StreamCaptionResponse) -> CaptionUpdate:
    """Read one message of a stream."""
    if response.WhichOneof("update") == "response":
        return CaptionUpdate("", (), from_proto(response.response))
    part = response.part
    return CaptionUpdate(
        part.text, tuple(part.token_ids), None, tuple(map(_beam_step, part.beam_steps))
    )


def _region(message: caption_pb2.DescribedRegion) -> DescribedRegion:
    box = message.region
    return DescribedRegion(
        (box.left, box.top, box.right, box.bottom), tuple(map(_caption, message.captions))
    )


def _caption(message: caption_pb2.Caption) -> Caption:
    return Caption(
        text=message.text,
        score=message.score,
        token_ids=tuple(message.token_ids),
        token_logprobs=tuple(message.token_logprobs),
        finish_reason=_FINISH_REASONS.get(message.finish_reason, FinishReason.UNKNOWN),
        token_texts=tuple(message.token_texts),
        confidence=message.confidence,
        degenerate=message.degenerate,
        attention=_attention(message),
        words=tuple(map(_word, message.words)),
        token_groundings=(
            tuple(message.token_groundings) if message.HasField("grounding") else None
        ),
        grounding=message.grounding if message.HasField("grounding") else None,
        needs_review=message.needs_review,
        review_reasons=tuple(
            _REVIEW_REASONS.get(reason, ReviewReason.UNKNOWN) for reason in message.review_reasons
        ),
    )


def _word(message: caption_pb2.Word) -> Word:
    return Word(
        text=message.text,
        first_token=message.first_token,
        tokens=message.tokens,
        confidence=message.confidence,
        grounding=message.grounding if message.HasField("grounding") else None,
    )


def _beams(message: caption_pb2.BeamHistory) -> BeamHistory:
    paths = tuple(
        BeamPath(
            tuple(path.continuations),
            tuple(
                tuple(map(LikelyToken, each.token_ids, each.token_texts, each.token_logprobs))
                for each in path.likeliest
            ),
        )
        for path in message.paths
    )
    return BeamHistory(tuple(map(_beam_step, message.steps)), paths)


def _beam_step(message: caption_pb2.BeamStep) -> BeamStep:
    return tuple(map(Continuation, *_columns(message)))


def _columns(step: caption_pb2.BeamStep) -> Iterator[Iterable[Any]]:
    """The fields of Continuation, in their order."""
    yield step.parents
    yield step.token_ids
    yield step.token_texts
    yield step.token_logprobs
    yield step.scores
    yield (_BEAM_FATES.get(fate, BeamFate.UNKNOWN) for fate in step.fates)
    yield (None if beam < 0 else beam for beam in step.beams)


def _attention(message: caption_pb2.Caption) -> Attention | None:
    if not message.HasField("attention"):
        return None
    attention = message.attention
    return Attention(attention.rows, attention.cols, tuple(attention.values))


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """One version of the model.

    Attributes:
        version: its number.
        is_default: whether requests without a version get it.
        precision: of its weights: fp32, int8 or int4.
        image_size: (height, width) in pixels of the images that it reads.
        defaults: the checkpoint's own options, by name.
    """

    version: int
    is_default: bool
    precision: str
    image_size: tuple[int, int]
    defaults: dict[str, object]


@dataclasses.dataclass(frozen=True)
class OptionLimits:
    """What one decoding option may be.

    Attributes:
        help: what it does.
        range: the values allowed, in words; empty where every value is.
    """

    help: str
    range: str


@dataclasses.dataclass(frozen=True)
class Models:
    """What a service serves.

    Attributes:
        models: the versions that can be asked, the newest first.
        message_bytes: largest request.
        image_pixels: largest image.
        deadline_cap_seconds: longest time a caption may take.
        window: images of one `caption_many` that the service works on at a time.
        options: what each decoding option may be, by name.
        regions: regions and tiles that one image may have together.
        slots: captions that are decoded at once, at most.
        working: captions in work now.
        waiting: captions that wait for their turn.
    """

    models: tuple[ModelInfo, ...]
    message_bytes: int
    image_pixels: int
    deadline_cap_seconds: float
    window: int
    options: dict[str, OptionLimits]
    regions: int
    slots: int
    working: int
    waiting: int


def models_from_proto(response: caption_pb2.GetModelsResponse) -> Models:
    """Read what a service says of itself."""
    limits, load = response.limits, response.load
    return Models(
        models=tuple(map(_model, response.models)),
        message_bytes=limits.message_bytes,
        image_pixels=limits.image_pixels,
        deadline_cap_seconds=limits.deadline_cap.ToMilliseconds() / 1e3,
        window=limits.window,
        options={each.name: OptionLimits(each.help, each.range) for each in limits.options},
        regions=limits.regions,
        slots=load.slots,
        working=load.working,
        waiting=load.waiting,
    )


def _model(message: caption_pb2.Model) -> ModelInfo:
    return ModelInfo(
        version=message.version,
        is_default=message.is_default,
        precision=message.precision,
        image_size=(message.image_height, message.image_width),
        defaults=options_from_proto(message.defaults),
    )
