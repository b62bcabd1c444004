"""One row of the output: what has become of an image."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from captionserve import AltText, CaptionError, CaptionResult
from captionserve._alt_text import alt_text_of


class _BestCaption(NamedTuple):
    """What alt text is made of."""

    text: str
    confidence: float
    degenerate: bool


@dataclass(frozen=True)
class Row:
    """The columns of every output, in their order; `error_*` are None when it is captioned.

    Attributes:
        id: the path within its source folder, the row's id in a table, or the key in a shard.
        source: the absolute path; of a table's row the value there, of a shard "shard.tar#key".
        sha256: of the file's bytes, in hexadecimal; None if it could not be read.
        width: in pixels, as the image is to be seen; None if its header could not be read.
        height: likewise.
        caption: the best caption's text.
        captions: the texts of all captions, the best first.
        score: of the best caption.
        confidence: likewise, from 0 to 1.
        degenerate: likewise, whether it repeats itself.
        model: the version that made it.
        options_fingerprint: the same for the same options and the same defaults of the model.
        error_code: a gRPC status code, or NOT_SENT.
        error_reason: stable, for programs.
        error_message: for people.
    """

    id: str
    source: str
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    caption: str | None = None
    captions: tuple[str, ...] | None = None
    score: float | None = None
    confidence: float | None = None
    degenerate: bool | None = None
    model: str | None = None
    options_fingerprint: str | None = None
    error_code: str | None = None
    error_reason: str | None = None
    error_message: str | None = None

    @property
    def failed(self) -> bool:
        """Whether there is no caption."""
        return self.error_code is not None

    def alt_text(self, max_chars: int) -> AltText | None:
        """The caption as alt text; None where there is no caption."""
        if self.caption is None or self.confidence is None or self.degenerate is None:
            return None
        best = _BestCaption(self.caption, self.confidence, self.degenerate)
        return alt_text_of(best, max_chars, file_name=PurePosixPath(self.id).name)

    def with_result(self, result: CaptionResult) -> Row:
        """The row of an image that was captioned."""
        best = result.captions[0]
        return dataclasses.replace(
            self,
            caption=best.text,
            captions=tuple(caption.text for caption in result.captions),
            score=best.score,
            confidence=best.confidence,
            degenerate=best.degenerate,
            model=str(result.model_version),
        )

    def with_error(self, error: Exception) -> Row:
        """The row of an image that was not."""
        if isinstance(error, CaptionError):
            code, reason, message = error.code.name, error.reason, error.message
        else:
            said = error.strerror if isinstance(error, OSError) else None
            code, reason, message = "NOT_SENT", "UNREADABLE", said or "the image cannot be read"
        return dataclasses.replace(
            self, error_code=code, error_reason=reason, error_message=message
        )


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))
"""The names of the columns, in their order."""
