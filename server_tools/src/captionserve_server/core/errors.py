"""The one tree of errors a caller can be shown.

    CaptionServeError
    ├── InvalidRequestError         the caller must change the request
    │   ├── ImageMissingError
    │   ├── ImageCorruptError
    │   ├── UnsupportedImageFormatError
    │   ├── ImageTooManyPixelsError
    │   ├── InvalidPixelValuesError
    │   ├── InvalidFramingError     carries one violation per field, and so does
    │   └── InvalidOptionsError
    ├── UnauthenticatedError        the caller is not known
    ├── ModelNotFoundError          that version is not served
    ├── OverloadedError             try again later
    ├── DeadlineExceededError
    ├── CancelledError
    ├── ModelUnavailableError       the model server does not answer
    └── ModelFaultError             the model misbehaved; trying again will not help

Messages are written for the caller: no path, no stack trace, no other exception's text. They are
bounded, whatever a caller wrote that is repeated in them. The table from this tree to gRPC status
codes is in gateway/status.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

# Errors travel as headers, of which gRPC mangles or drops more than 8 KiB: the message as it is and
# once more beside the fields, in base64. With these bounds a status stays below 4 KiB.
MAX_MESSAGE_BYTES = 480
MAX_FIELDS_BYTES = 1900
_MAX_NAME_BYTES = 60
# Tried in turn until all fields have room.
_MAX_TEXT_BYTES = (200, 100, 60, 40, 24)
# What a field takes beside its name and text: its place in the request, and punctuation.
_FIELD_BYTES = 20
_CUT = "..."


class CaptionServeError(Exception):
    """Base of every error that reaches a caller.

    Attributes:
        reason: stable machine-readable name in UPPER_SNAKE_CASE.
        message: one sentence for a person, cut where it is too long to be sent.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str) -> None:
        """Store the sentence that the caller will read."""
        self.message = shortened(message, MAX_MESSAGE_BYTES)
        super().__init__(self.message)

    @property
    def field_violations(self) -> Mapping[str, str]:
        """What is wrong, by request field; empty when no single field is at fault."""
        return MappingProxyType({})


class InvalidRequestError(CaptionServeError):
    """The request is wrong as it stands."""

    reason = "INVALID_REQUEST"


class ImageMissingError(InvalidRequestError):
    """The request holds no image."""

    reason = "IMAGE_MISSING"


class ImageCorruptError(InvalidRequestError):
    """The image is empty, truncated or damaged."""

    reason = "IMAGE_CORRUPT"


class UnsupportedImageFormatError(InvalidRequestError):
    """The bytes are no image of an accepted format."""

    reason = "UNSUPPORTED_IMAGE_FORMAT"


class ImageTooManyPixelsError(InvalidRequestError):
    """The image's header announces more pixels than are accepted."""

    reason = "IMAGE_TOO_MANY_PIXELS"


class InvalidPixelValuesError(InvalidRequestError):
    """Preprocessed pixel values are not what the checkpoint's image processor makes."""

    reason = "INVALID_PIXEL_VALUES"


class _InvalidFieldsError(InvalidRequestError):
    """Base of those that say what is wrong field by field; never raised itself."""

    def __init__(self, violations: Mapping[str, str]) -> None:
        """Store what is wrong with each field, {field name: sentence}, as far as there is room."""
        self._violations = _bounded(violations)
        super().__init__("; ".join(f"{name}: {text}" for name, text in self._violations.items()))

    @property
    def field_violations(self) -> Mapping[str, str]:
        """What is wrong, by field name."""
        return MappingProxyType(self._violations)


class InvalidFramingError(_InvalidFieldsError):
    """Regions or tiles that the image does not have, or a way of resizing that there is not."""

    reason = "INVALID_FRAMING"


class InvalidOptionsError(_InvalidFieldsError):
    """One or more generation options are out of range or contradict each other."""

    reason = "INVALID_OPTIONS"


class UnauthenticatedError(CaptionServeError):
    """The caller has not said who calls, or with a token that is not known."""

    reason = "UNAUTHENTICATED"


class ModelNotFoundError(CaptionServeError):
    """The version of the model that is asked for is not served."""

    reason = "MODEL_NOT_FOUND"


class OverloadedError(CaptionServeError):
    """The server has no room for the request now."""

    reason = "OVERLOADED"


class DeadlineExceededError(CaptionServeError):
    """The caller's deadline passed before the caption was complete."""

    reason = "DEADLINE_EXCEEDED"


class CancelledError(CaptionServeError):
    """The caller gave up."""

    reason = "CANCELLED"


class ModelUnavailableError(CaptionServeError):
    """The model server cannot be reached or is not ready."""

    reason = "MODEL_UNAVAILABLE"


class ModelFaultError(CaptionServeError):
    """The model or its server did something it must not do."""

    reason = "MODEL_FAULT"


def all_error_types() -> tuple[type[CaptionServeError], ...]:
    """Every class of the tree that is raised, parents before children."""
    found: list[type[CaptionServeError]] = [CaptionServeError]
    for error_type in found:
        found.extend(error_type.__subclasses__())
    return tuple(each for each in found if "reason" in vars(each))


def shortened(text: str, most_bytes: int) -> str:
    """A text that may be a caller's, as an error can repeat it.

    Args:
        text: halves of surrogate pairs, which cannot be sent, are written out.
        most_bytes: what it may take on its way, where letters beyond ASCII are escaped; a longer
            one is cut and ends with dots.
    """
    # Each character takes at least a byte, so that no more of a long text need be looked at.
    begin = text[: most_bytes + 1].encode(errors="backslashreplace").decode()
    if len(text) <= most_bytes and _bytes_sent(begin) <= most_bytes:
        return begin
    room, end = most_bytes - len(_CUT), 0
    while end < len(begin) and (room := room - _bytes_sent(begin[end])) >= 0:
        end += 1
    return begin[:end] + _CUT


def _bytes_sent(text: str) -> int:
    """What a text takes at most, in JSON as Triton's error or percent-encoded as gRPC's."""
    if text.isascii() and text.isprintable() and not set(text) & set('%"\\'):
        return len(text)
    in_json = len(json.dumps(text)) - 2
    return max(in_json, sum(1 if " " <= c <= "~" and c != "%" else 3 for c in _utf_8(text)))


def _utf_8(text: str) -> str:
    """Its bytes in UTF-8, as characters of their own."""
    return text.encode().decode("latin-1")


def _bounded(violations: Mapping[str, str]) -> dict[str, str]:
    """The violations with names and texts cut, and the last ones left out, until there is room."""
    first = list(itertools.islice(violations.items(), MAX_FIELDS_BYTES // _FIELD_BYTES))
    bounded: dict[str, str] = {}
    for most in _MAX_TEXT_BYTES:
        bounded = {shortened(name, _MAX_NAME_BYTES): shortened(text, most) for name, text in first}
        if _fields_bytes(bounded) <= MAX_FIELDS_BYTES:
            return bounded
    while _fields_bytes(bounded) > MAX_FIELDS_BYTES:
        bounded.popitem()
    return bounded


def _fields_bytes(violations: Mapping[str, str]) -> int:
    return sum(
        _FIELD_BYTES + _bytes_sent(name) + _bytes_sent(text) for name, text in violations.items()
    )
