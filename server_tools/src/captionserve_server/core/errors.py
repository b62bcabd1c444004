"""The one tree of errors a caller can be shown.

    CaptionServeError
    ├── InvalidRequestError         the caller must change the request
    │   ├── ImageMissingError
    │   ├── ImageCorruptError
    │   ├── UnsupportedImageFormatError
    │   ├── ImageTooManyPixelsError
    │   └── InvalidOptionsError     carries one violation per field
    ├── OverloadedError             try again later
    ├── DeadlineExceededError
    ├── CancelledError
    ├── ModelUnavailableError       the model server does not answer
    └── ModelFaultError             the model misbehaved; trying again will not help

Messages are written for the caller: no path, no stack trace, no other exception's text. The table
from this tree to gRPC status codes is in gateway/status.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class CaptionServeError(Exception):
    """Base of every error that reaches a caller.

    Attributes:
        reason: stable machine-readable name in UPPER_SNAKE_CASE.
        message: one sentence for a person.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str) -> None:
        """Store the sentence that the caller will read."""
        super().__init__(message)
        self.message = message

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


class InvalidOptionsError(InvalidRequestError):
    """One or more generation options are out of range or contradict each other."""

    reason = "INVALID_OPTIONS"

    def __init__(self, violations: Mapping[str, str]) -> None:
        """Store what is wrong with each option: {field name: sentence}."""
        self._violations = dict(violations)
        super().__init__("; ".join(f"{name}: {text}" for name, text in self._violations.items()))

    @property
    def field_violations(self) -> Mapping[str, str]:
        """What is wrong, by option name."""
        return MappingProxyType(self._violations)


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
    """Every class of the tree, parents before children."""
    found: list[type[CaptionServeError]] = [CaptionServeError]
    for error_type in found:
        found.extend(error_type.__subclasses__())
    return tuple(found)
