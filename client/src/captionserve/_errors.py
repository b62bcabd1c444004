"""The one error a call raises, and the one place where gRPC's errors become it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

_DOMAIN = "captionserve"

NOT_CAPTIONSERVE = "NOT_CAPTIONSERVE"
TLS_FAILED = "TLS_FAILED"
CLIENT_CLOSED = "CLIENT_CLOSED"
OVERLOADED = "OVERLOADED"
STREAM_BROKEN = "STREAM_BROKEN"

# What no later attempt will do better, although gRPC calls it UNAVAILABLE.
FINAL_REASONS = {NOT_CAPTIONSERVE, TLS_FAILED, STREAM_BROKEN}

_NO_CAPTIONSERVE = (
    "what answers at this address is no captionserve: the HOST:PORT that `captionserve serve "
    "--listen` was given is wanted"
)
_NOBODY = "nobody listens at this address: is the service started, and is this its port?"
_CLOSED = (
    "the connection was closed: the service has ended, or wants TLS, or a client's certificate"
)
# What gRPC itself says of a connection, in the order in which to look; each with the reason, None
# for the code's name, and a sentence.
_OF_CONNECTIONS: tuple[tuple[str, str | None, str], ...] = (
    ("http1.x server", NOT_CAPTIONSERVE, _NO_CAPTIONSERVE),
    ("Failed parsing HTTP/2", NOT_CAPTIONSERVE, _NO_CAPTIONSERVE),
    ("WRONG_VERSION_NUMBER", TLS_FAILED, "what answers at this address does not speak TLS"),
    ("CERTIFICATE_VERIFY_FAILED", TLS_FAILED, "no known authority vouches for the certificate"),
    ("Hostname Verification", TLS_FAILED, "the certificate is of another name"),
    ("create security handshaker", TLS_FAILED, "the certificates given for TLS cannot be used"),
    ("Connection refused", None, _NOBODY),
    ("errors resolving", None, "this address is not known"),
    ("Socket closed", None, _CLOSED),
    ("Connection reset", None, _CLOSED),
    ("Deadline Exceeded", None, "the deadline passed before the service answered"),
)
# How Envoy ends a stream whose service it has lost. gRPC makes INTERNAL of it, which a service of
# ours says with details only.
_RESET_BY_A_PROXY = "RST_STREAM with error code 2"


class CaptionError(Exception):
    """A call failed.

    A call on a client that is closed, or is closed meanwhile, fails with the reason CLIENT_CLOSED,
    one to an address where something else listens with NOT_CAPTIONSERVE, one whose two ends do not
    agree on TLS with TLS_FAILED, and a stream that cannot go on where it broke off with
    STREAM_BROKEN.

    Attributes:
        code: gRPC's status code.
        reason: stable machine-readable name, such as IMAGE_CORRUPT; the code's name when the
            failure came from gRPC itself, such as UNAVAILABLE or DEADLINE_EXCEEDED.
        message: one sentence for a person.
        retry_after: seconds after which the server asks to be tried again; None where it does not.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        field_violations: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Store what is known of the failure."""
        # A plain dict, so that the error can be pickled and cross processes.
        self._field_violations = dict(field_violations or {})
        super().__init__(code, reason, message, self._field_violations, retry_after)
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after = retry_after

    @property
    def field_violations(self) -> Mapping[str, str]:
        """What is wrong, by path of the request's field, such as options.num_beams.

        Empty when no field is at fault.
        """
        return MappingProxyType(self._field_violations)

    def __str__(self) -> str:
        """Reason and message, as a traceback shows them."""
        return f"{self.reason}: {self.message}"


def from_rpc_error(error: grpc.RpcError) -> CaptionError:
    code, text, status = error.code(), error.details() or error.code().name, _rich_status(error)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return CaptionError(code, NOT_CAPTIONSERVE, _NO_CAPTIONSERVE)
    if not status.details:  # Else a service has said it.
        if _RESET_BY_A_PROXY in text:
            lost = grpc.StatusCode.UNAVAILABLE
            return CaptionError(lost, lost.name, "a proxy has lost the service")
        for words, reason, sentence in _OF_CONNECTIONS:
            if words in text:
                return CaptionError(code, reason or code.name, sentence)
    return from_status(code, text, status)


def from_status(code: grpc.StatusCode, message: str, status: status_pb2.Status) -> CaptionError:
    """The error of a call or of one of its items.

    Args:
        code: the status code.
        message: the sentence that came with it.
        status: may have details, of which those that can be read are.
    """
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry_info = error_details_pb2.RetryInfo()
    ours = _read_detail(status, info) and info.domain == _DOMAIN
    _read_detail(status, bad_request)
    waits = _read_detail(status, retry_info)
    return CaptionError(
        code=code,
        reason=info.reason if ours else code.name,
        message=message,
        field_violations={item.field: item.description for item in bad_request.field_violations},
        retry_after=max(0.0, retry_info.retry_delay.ToMilliseconds() / 1e3) if waits else None,
    )


def _rich_status(error: grpc.RpcError) -> status_pb2.Status:
    """The google.rpc.Status that came with the error; an empty one when there is none to read."""
    try:
        # Every RpcError of a call is a Call as well, which the type stubs do not say.
        status = rpc_status.from_call(cast(grpc.Call, error))
    except (ValueError, DecodeError):
        # A proxy's or another server's; the plain status still tells enough.
        status = None
    return status or status_pb2.Status()


def _read_detail(status: status_pb2.Status, detail: Message) -> bool:
    """Fill `detail` from the first detail of its type; False when there is none to be read."""
    for packed in status.details:
        if packed.Is(detail.DESCRIPTOR):
            try:
                return bool(packed.Unpack(detail))
            except DecodeError:  # Another server's.
                detail.Clear()
    return False
