"""Captions made in this process, in the client's own types: `captionserve caption --local`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from captionserve import (
    Attention,
    Caption,
    CaptionError,
    CaptionResult,
    FinishReason,
    GenerationOptions,
)
from numpy.typing import NDArray

from captionserve_server.core.errors import CaptionServeError
from captionserve_server.gateway.status import CODES, field_violations
from captionserve_server.local import FinishedCaption, LocalCaptioner, LocalResult


def local_outcomes(
    images: Sequence[Path], options: GenerationOptions, folder: Path
) -> Iterator[CaptionResult | CaptionError | OSError]:
    """What becomes of each image, as a service of the model repository would answer.

    Raises:
        ModelFolderError: if the folder is no model repository.
    """
    with LocalCaptioner(folder) as captioner:
        try:
            outcomes = captioner.caption_each(images, options)
        except CaptionServeError as error:
            outcomes = itertools.repeat(error, len(images))
        for outcome in outcomes:
            if isinstance(outcome, LocalResult):
                yield _result(outcome)
            elif isinstance(outcome, CaptionServeError):
                yield CaptionError(
                    CODES[type(outcome)],
                    outcome.reason,
                    outcome.message,
                    field_violations(outcome),
                )
            else:
                yield outcome


def _result(result: LocalResult) -> CaptionResult:
    captions = tuple(_caption(found) for found in result.captions)
    return CaptionResult(captions, result.model_version, cached=False)


def _caption(found: FinishedCaption) -> Caption:
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    values["finish_reason"] = FinishReason(found.finish_reason)
    values["attention"] = None if found.attention is None else _attention(found.attention)
    return Caption(**values)


def _attention(attention: NDArray[np.float32]) -> Attention:
    _, rows, cols = attention.shape
    return Attention(rows, cols, tuple(attention.ravel().tolist()))
