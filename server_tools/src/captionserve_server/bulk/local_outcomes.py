"""Captions made in this process, in the client's own types, as a service would answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from captionserve import (
    Attention,
    BeamFate,
    BeamHistory,
    BeamPath,
    Caption,
    CaptionError,
    CaptionResult,
    CaptionUpdate,
    Continuation,
    DescribedRegion,
    FinishReason,
    Framing,
    GenerationOptions,
    LikelyToken,
    ReviewReason,
    Stage,
    Word,
)
from numpy.typing import NDArray

from captionserve_server.core.beams import BeamHistory as LocalBeamHistory
from captionserve_server.core.beams import BeamStep
from captionserve_server.core.errors import CaptionServeError
from captionserve_server.gateway.status import CODES, field_violations
from captionserve_server.local import FinishedCaption, LocalCaptioner, LocalResult, LocalUpdate


def local_outcomes(
    captioner: LocalCaptioner,
    images: Iterable[Path | bytes],
    options: GenerationOptions,
    framing: Framing,
) -> Iterator[CaptionResult | CaptionError | OSError]:
    """What becomes of each image, as a service of the captioner's model would answer.

    Raises:
        CaptionError: if options or framing are wrong whatever the image, before any is read.
    """
    with errors_as_called():
        outcomes = captioner.caption_each(images, options, **framing)
    for outcome in outcomes:
        if isinstance(outcome, LocalResult):
            yield _result(outcome)
        else:
            yield _as_called(outcome) if isinstance(outcome, CaptionServeError) else outcome


def local_updates(
    captioner: LocalCaptioner,
    image: Path | bytes,
    options: GenerationOptions,
    framing: Framing,
) -> Generator[CaptionUpdate, None, None]:
    """What becomes known of an image's captions, as a service's stream would tell it.

    Raises:
        CaptionError: if there are none.
        OSError: if the file cannot be read.
    """
    with (
        errors_as_called(),
        closing(captioner.caption_stream(image, options, **framing)) as updates,
    ):
        yield from map(as_told, updates)


def as_told(update: LocalUpdate) -> CaptionUpdate:
    """An update as a service's stream has it."""
    result = None if update.result is None else _result(update.result)
    return CaptionUpdate(
        update.text, update.token_ids, result, tuple(map(_beam_step, update.beam_steps))
    )


@contextmanager
def errors_as_called() -> Iterator[None]:
    """Raise what a caller of a service gets."""
    try:
        yield
    except CaptionServeError as error:
        raise _as_called(error) from error


def _as_called(error: CaptionServeError) -> CaptionError:
    """The error that a caller of a service gets."""
    return CaptionError(CODES[type(error)], error.reason, error.message, field_violations(error))


def _result(result: LocalResult) -> CaptionResult:
    return CaptionResult(
        tuple(map(_caption, result.captions)),
        result.model_version,
        cached=False,
        regions=tuple(
            DescribedRegion(region.box, tuple(map(_caption, region.captions)))
            for region in result.regions
        ),
        beams=None if result.beams is None else _beams(result.beams),
        stages=tuple(Stage(each.name, each.milliseconds) for each in result.stages),
    )


def _beams(told: LocalBeamHistory) -> BeamHistory:
    return BeamHistory(
        tuple(map(_beam_step, told.steps)),
        tuple(
            BeamPath(
                path.continuations,
                tuple(
                    tuple(LikelyToken(**vars(each)) for each in tokens) for tokens in path.likeliest
                ),
            )
            for path in told.paths
        ),
    )


def _beam_step(step: BeamStep) -> tuple[Continuation, ...]:
    return tuple(Continuation(**{**vars(each), "fate": BeamFate(each.fate)}) for each in step)


def _caption(found: FinishedCaption) -> Caption:
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(Caption)}
    values["finish_reason"] = FinishReason(found.finish_reason)
    values["attention"] = None if found.attention is None else _attention(found.attention)
    values["words"] = tuple(Word(**vars(word)) for word in found.words)
    values["review_reasons"] = tuple(map(ReviewReason, found.review_reasons))
    return Caption(**values)


def _attention(attention: NDArray[np.float32]) -> Attention:
    _, rows, cols = attention.shape
    return Attention(rows, cols, tuple(attention.ravel().tolist()))
