"""Serving the page until the process is told to end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

# Captions that are in work at the end may still be answered; a page that stays open may not.
_DRAIN_SECONDS = 5


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens while the block runs; port 0 is any free one.

    Raises:
        OSError: if nobody can listen there; its text says where.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot listen on {host}:{port} ({error.strerror}); --listen takes another address, "
            "with port 0 any free one",
        ) from error
    with listener:
        yield listener


def address(listener: socket.socket) -> str:
    """Where a socket listens, as a URL has it."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def run(app: ASGIApp, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve an app until SIGINT or SIGTERM.

    Args:
        app: what is served.
        listener: where.
        announce: called once it answers.
    """
    server = _Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        ),
        announce,
    )

    # uvicorn takes these signals, and sends them anew once it has ended: to end was the wish.
    def end(number: int, frame: object) -> None:
        server.should_exit = True

    before = [(number, signal.signal(number, end)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._announce()
