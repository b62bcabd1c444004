"""What both clients tell gRPC: where to call, as whom, and for how long."""

from __future__ import annotations

import ipaddress
import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import grpc

from captionserve._errors import CLIENT_CLOSED, CaptionError
from captionserve._framing import Framing, set_framing
from captionserve._images import ImageInput, image_message
from captionserve._options import GenerationOptions, to_proto
from captionserve._retry import Attempts, RetryBudget
from captionserve._trace import trace_context
from captionserve.v1 import caption_pb2

DEFAULT_TIMEOUT_SECONDS = 30.0
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
# A stream's request is a message around it, of at most 8 bytes more.
_MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - 8
# A server that restarts is found again within this time, and so is who has taken its place behind a
# name; gRPC's own limits are two minutes and half a minute, in which all replicas may have changed.
_FIRST_RECONNECT_MILLISECONDS = 200
_MAX_RECONNECT_MILLISECONDS = 2_000
# A connection that nobody answers on is given up after both together; the server allows a ping
# every ten seconds.
_KEEPALIVE_MILLISECONDS = 20_000
_KEEPALIVE_TIMEOUT_MILLISECONDS = 10_000
# A connection without calls is closed before the server does it (after five minutes, where nothing
# else was said): what the server closes, gRPC opens again at once.
_IDLE_MILLISECONDS = 240_000

# Several addresses behind one name share the calls.
_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})

_SIZE_HEADER = "captionserve-request-bytes"

Token = str | Callable[[], str]
"""A bearer token, or what gives the present one; asked for each attempt."""

Priority = Literal["interactive", "bulk"]
"""Whose turn comes first; bulk comes behind all that is interactive."""

_PRIORITIES: Mapping[Priority | None, caption_pb2.Priority.ValueType] = {
    None: caption_pb2.PRIORITY_UNSPECIFIED,
    "interactive": caption_pb2.PRIORITY_INTERACTIVE,
    "bulk": caption_pb2.PRIORITY_BULK,
}

Metadata = tuple[tuple[str, str], ...]


def tls_credentials(
    ca: str | Path | bytes | None = None,
    certificate: str | Path | bytes | None = None,
    key: str | Path | bytes | None = None,
) -> grpc.ChannelCredentials:
    """Credentials for TLS, and for mTLS with a certificate of one's own.

    Args:
        ca: certificates that vouch for the server, a path or PEM bytes; None takes the system's.
        certificate: this client's own chain, likewise.
        key: its private key, likewise; goes with the certificate.

    Raises:
        ValueError: if there is a certificate without key, or the other way round.
        OSError: if a file cannot be read.
    """
    if (certificate is None) != (key is None):
        raise ValueError("certificate and key go together")
    return grpc.ssl_channel_credentials(_pem(ca), _pem(key), _pem(certificate))


def _pem(given: str | Path | bytes | None) -> bytes | None:
    return given if given is None or isinstance(given, bytes) else Path(given).read_bytes()


@dataclass(frozen=True)
class Connection:
    """What a client knows of its service, whichever way it waits.

    Attributes:
        target: as gRPC names it.
        credentials: for TLS, if any.
        closed: set when the client has been closed.
    """

    target: str
    credentials: grpc.ChannelCredentials | None
    closed: threading.Event
    _timeout_seconds: float
    _token: Token | None = field(repr=False)
    _budget: RetryBudget
    _model_version: int
    _priority: Priority | None

    @classmethod
    def of(
        cls,
        target: str,
        timeout: float,
        credentials: grpc.ChannelCredentials | None,
        token: Token | None,
        model_version: int | None,
        priority: Priority | None,
    ) -> Connection:
        """Check and keep a client's arguments; ValueError as it says."""
        if not target or target.startswith(("http:", "https:")):
            raise ValueError(f"the target must be as HOST:PORT, is {target!r}")
        if token is not None and credentials is None and not _is_loopback(target):
            raise ValueError(
                f"the token would travel to {target} for everybody to read: it needs TLS"
            )
        if model_version is not None and not 0 < model_version < 2**63:
            raise ValueError(f"model_version must be a positive number, is {model_version}")
        if priority not in _PRIORITIES:
            raise ValueError(f"priority must be interactive or bulk, is {priority!r}")
        return cls(
            target,
            credentials,
            threading.Event(),
            checked_timeout(timeout),
            token,
            RetryBudget(),
            model_version or 0,
            priority,
        )

    def attempts(self, timeout: float | None) -> Attempts:
        """The attempts of a call, which may take so long; None takes the client's timeout."""
        seconds = self._timeout_seconds if timeout is None else checked_timeout(timeout)
        return Attempts(self._budget, seconds)

    def request(
        self,
        image: ImageInput,
        options: GenerationOptions | None,
        framing: Framing,
        *,
        bypass_cache: bool,
    ) -> caption_pb2.CaptionRequest:
        """Read and encode the image and put beside it what is asked.

        Raises:
            CaptionError: IMAGE_TOO_LARGE, if it does not fit into a message; or if an option or the
                framing cannot be sent; otherwise as `image_message` does.
        """
        request = caption_pb2.CaptionRequest(
            image=image_message(image),
            options=None if options is None else to_proto(options),
            bypass_cache=bypass_cache,
            model_version=self._model_version,
            priority=_PRIORITIES[self._priority],
        )
        set_framing(request, framing)
        if request.ByteSize() > _MAX_REQUEST_BYTES:
            raise too_large(request.ByteSize(), _MAX_REQUEST_BYTES)
        return request

    def metadata(self, request_bytes: int | None = None) -> Metadata:
        """What goes ahead of a call: who calls, in which trace, and how large its request is.

        Raises:
            ValueError: if the token cannot be sent.
        """
        entries: list[tuple[str, str]] = []
        if self._token is not None:
            token = self._token() if callable(self._token) else self._token
            if not (token.isascii() and token.isprintable()):
                # gRPC would say so as well, and repeat the token.
                raise ValueError("the token has other characters than printable ASCII")
            entries.append(("authorization", f"Bearer {token}"))
        if request_bytes is not None:
            entries.append((_SIZE_HEADER, str(request_bytes)))
        return (*entries, *trace_context())

    def closed_error(self) -> CaptionError:
        """What a call on a closed client fails with."""
        return CaptionError(grpc.StatusCode.CANCELLED, CLIENT_CLOSED, "the client has been closed")


def _is_loopback(target: str) -> bool:
    """Whether calls to a target stay on this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = target.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:")
    return all(_is_loopback_address(address) for address in addresses.split(","))


def _is_loopback_address(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]") or address
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def channel_options() -> list[tuple[str, int | str]]:
    """The channel's options, the same for both clients."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.service_config", _SERVICE_CONFIG),
        # The clients try again themselves; see _retry.py.
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", _FIRST_RECONNECT_MILLISECONDS),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MILLISECONDS),
        ("grpc.dns_min_time_between_resolutions_ms", _MAX_RECONNECT_MILLISECONDS),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MILLISECONDS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MILLISECONDS),
        ("grpc.client_idle_timeout_ms", _IDLE_MILLISECONDS),
        # Without it newer versions of gRPC wait a minute for the answer to a ping all the same.
        ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MILLISECONDS),
        # The target alone says where calls go, not the environment.
        ("grpc.enable_http_proxy", 0),
    ]


def checked_timeout(seconds: float) -> float:
    """Give the timeout back.

    Raises:
        ValueError: if it is not a positive, finite number.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"timeout must be a positive number of seconds, is {seconds}")
    return seconds


def too_large(size: int, most: int) -> CaptionError:
    """The error of an image whose message has more bytes than may be sent.

    gRPC would say RESOURCE_EXHAUSTED, as for an overload, and nothing of the image.
    """
    return CaptionError(
        grpc.StatusCode.INVALID_ARGUMENT,
        "IMAGE_TOO_LARGE",
        f"the image takes {size} bytes as it is sent, at most {most} fit: "
        "make it smaller, or give it as a JPEG file",
    )
