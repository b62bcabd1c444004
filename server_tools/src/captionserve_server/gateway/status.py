"""The one table from errors to gRPC statuses, and the details that go with each."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from captionserve_server.core import errors

DOMAIN = "captionserve"
# When to come back: about the time in which a handful of captions is finished and room is made, and
# a part of the time in which Triton is started anew.
RETRY_DELAYS: Mapping[type[errors.CaptionServeError], float] = {
    errors.OverloadedError: 1.0,
    errors.ModelUnavailableError: 0.5,
}

CODES: Mapping[type[errors.CaptionServeError], grpc.StatusCode] = {
    errors.CaptionServeError: grpc.StatusCode.INTERNAL,
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ImageMissingError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ImageCorruptError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnsupportedImageFormatError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ImageTooManyPixelsError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidPixelValuesError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidFramingError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidOptionsError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    # Not UNAVAILABLE: clients retry that by themselves, which feeds an overload.
    errors.OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.CancelledError: grpc.StatusCode.CANCELLED,
    errors.ModelUnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.ModelFaultError: grpc.StatusCode.INTERNAL,
}

_IMAGE_ERRORS = (
    errors.ImageMissingError,
    errors.ImageCorruptError,
    errors.UnsupportedImageFormatError,
    errors.ImageTooManyPixelsError,
    errors.InvalidPixelValuesError,
)


@dataclass(frozen=True)
class RpcStatus:
    """How a failed call ends, as gRPC wants it.

    Attributes:
        code: the status code.
        message: the sentence for the caller.
        trailing_metadata: google.rpc.Status with the details, and hints to retrying clients.
    """

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def rpc_status(error: errors.CaptionServeError) -> RpcStatus:
    """The status that tells a caller of an error."""
    code = CODES[type(error)]
    status = google_status(error)
    metadata: list[tuple[str, str | bytes]] = [
        ("grpc-status-details-bin", status.SerializeToString())
    ]
    if isinstance(error, errors.OverloadedError):
        milliseconds = int(1e3 * RETRY_DELAYS[type(error)])
        metadata.append(("grpc-retry-pushback-ms", str(milliseconds)))
    return RpcStatus(code, error.message, tuple(metadata))


def code_of(error: BaseException) -> grpc.StatusCode:
    """The code of whatever a caption ends with."""
    if isinstance(error, errors.CaptionServeError):
        return CODES[type(error)]
    cancelled = isinstance(error, asyncio.CancelledError)
    return grpc.StatusCode.CANCELLED if cancelled else grpc.StatusCode.INTERNAL


def google_status(error: errors.CaptionServeError) -> status_pb2.Status:
    """The same as a message of its own, which is all that an item of a call has."""
    status = status_pb2.Status(code=CODES[type(error)].value[0], message=error.message)
    for detail in _details(error):
        status.details.add().Pack(detail)
    return status


def _details(error: errors.CaptionServeError) -> list[Message]:
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    violations = field_violations(error)
    if violations:
        bad_request = error_details_pb2.BadRequest()
        for field, description in violations.items():
            bad_request.field_violations.add(field=field, description=description)
        details.append(bad_request)
    seconds = RETRY_DELAYS.get(type(error))
    if seconds is not None:
        delay = Duration()
        delay.FromMilliseconds(int(1e3 * seconds))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def field_violations(error: errors.CaptionServeError) -> dict[str, str]:
    """What is wrong, by field path in CaptionRequest."""
    if isinstance(error, errors.InvalidOptionsError):
        return {f"options.{name}": text for name, text in error.field_violations.items()}
    if isinstance(error, errors.InvalidFramingError):
        return dict(error.field_violations)
    if isinstance(error, _IMAGE_ERRORS):
        return {"image": error.message}
    return {}
