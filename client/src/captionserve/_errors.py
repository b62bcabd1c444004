"""The one error a call raises, and the one place where gRPC's errors become it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

_DOMAIN = "captionserve"


class CaptionError(Exception):
    """A call failed.

    Attributes:
        code: gRPC's status code.
        reason: stable machine-readable name, such as IMAGE_CORRUPT; the code's name when the
            failure came from gRPC itself, such as UNAVAILABLE or DEADLINE_EXCEEDED.
        message: one sentence for a person.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        field_violations: Mapping[str, str] | None = None,
    ) -> None:
        """Store what is known of the failure."""
        # A plain dict, so that the error can be pickled and cross processes.
        self._field_violations = dict(field_violations or {})
        super().__init__(code, reason, message, self._field_violations)
        self.code = code
        self.reason = reason
        self.message = message

    @property
    def field_violations(self) -> Mapping[str, str]:
        """What is wrong, by path of the request's field, such as options.num_beams.

        Empty when no field is at fault.
        """
        return MappingProxyType(self._field_violations)

    def __str__(self) -> str:
        """Reason and message, as a traceback shows them."""
        return f"{self.reason}: {self.message}"


@contextmanager
def errors_mapped() -> Iterator[None]:
    """Turn gRPC's errors into CaptionError."""
    try:
        yield
    except grpc.RpcError as error:
        raise _from_rpc_error(error) from error


def _from_rpc_error(error: grpc.RpcError) -> CaptionError:
    status = _rich_status(error)
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    _read_detail(status, info)
    _read_detail(status, bad_request)
    name = error.code().name
    return CaptionError(
        code=error.code(),
        reason=info.reason if info.domain == _DOMAIN else name,
        message=error.details() or name,
        field_violations={item.field: item.description for item in bad_request.field_violations},
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


def _read_detail(status: status_pb2.Status, detail: Message) -> None:
    """Fill `detail` from the first detail of its type; leaves it empty when there is none."""
    for packed in status.details:
        if packed.Is(detail.DESCRIPTOR):
            packed.Unpack(detail)
            return
