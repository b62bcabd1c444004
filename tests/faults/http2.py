"""HTTP/2 frames written by hand, for what no well-behaved library would send."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
ACK, END_STREAM, END_HEADERS = 1, 1, 4
INTERNAL_ERROR, CANCEL, ENHANCE_YOUR_CALM = 2, 8, 11


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame, whatever is in it."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def call_headers(stream: int, method: str) -> bytes:
    """The beginning of a gRPC call."""
    fields = (
        *((b":method", b"POST"), (b":scheme", b"http"), (b":path", method.encode())),
        *((b":authority", b"test"), (b"te", b"trailers"), (b"content-type", b"application/grpc")),
    )
    # Literals without indexing, not compressed.
    block = b"".join(
        b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields
    )
    return frame(HEADERS, END_HEADERS, stream, block)


class Connection:
    """A connection that sends what it is told, and reads frames."""

    def __init__(self, raw: socket.socket) -> None:
        self._raw = raw

    def send(self, content: bytes) -> None:
        """Send it; who has closed the connection does not mind."""
        with contextlib.suppress(ConnectionError):
            self._raw.sendall(content)

    def end(self) -> None:
        """Say that nothing more will come."""
        with contextlib.suppress(OSError):
            self._raw.shutdown(socket.SHUT_WR)

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """(kind, stream, payload) of each frame until the server closes the connection."""
        with contextlib.suppress(ConnectionError):
            while head := self._read(9):
                (size,) = struct.unpack(">I", b"\0" + head[:3])
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = self._read(size)
                if kind == SETTINGS and not flags & ACK:
                    self.send(frame(SETTINGS, ACK, 0, b""))
                yield kind, stream, payload

    def _read(self, size: int) -> bytes:
        read = b""
        while len(read) < size and (more := self._raw.recv(size - len(read))):
            read += more
        return read


@contextmanager
def connected(address: str, seconds: float, beginning: bytes | None = None) -> Iterator[Connection]:
    """A connection to host:port that has begun as HTTP/2 does, or otherwise.

    Args:
        address: of the service.
        seconds: how long to wait for whatever it says.
        beginning: sent first.
    """
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), seconds) as raw:
        connection = Connection(raw)
        opening = PREFACE + frame(SETTINGS, 0, 0, b"")
        connection.send(opening if beginning is None else beginning)
        yield connection
