"""A TCP proxy before the service that can be slow, swallow, cut and half-close."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

UP, DOWN = 0, 1


class Proxy:
    """Passes bytes on between clients and a service; both directions have counters and limits.

    Attributes:
        address: host:port for clients.
        bytes_per_second: of each direction; None for no limit.
        connections: that were opened until now.
        passed: bytes until now, UP and DOWN.
        cut_at: of `passed`, where all connections are cut, once; None for nowhere.
        swallow_at: of `passed` UP, from where on nothing is passed on; None for nowhere.
    """

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self.address = ""
        self.bytes_per_second: float | None = None
        self.connections = 0
        self.passed = [0, 0]
        self.cut_at: list[int | None] = [None, None]
        self.swallow_at: int | None = None
        self._loop = asyncio.new_event_loop()
        self._serving: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        # Of which nothing is passed on any more.
        self._swallowed: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Reset all connections."""
        self._do(self._cut)

    def swallow(self) -> None:
        """Pass nothing on of the connections there are, and let nobody know; new ones work."""
        self._do(lambda: self._swallowed.update(self._writers))

    def half_close(self) -> None:
        """Say to the service that the clients will send no more."""

        def end() -> None:
            for writer in self._writers:
                writer.write_eof()

        self._do(end)

    def _do(self, action: Callable[[], object]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(action)
        self._loop.call_soon_threadsafe(done.set)
        assert done.wait(10)

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._serving.add(self._loop.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers |= {writer, up_writer}
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(
                self._pump(reader, up_writer, UP), self._pump(up_reader, writer, DOWN)
            )
        self._writers -= {writer, up_writer}
        writer.transport.abort()
        up_writer.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: int
    ) -> None:
        while data := await reader.read(4096):
            if writer in self._swallowed:
                continue
            self.passed[direction] += len(data)
            if self.swallow_at is not None and self.passed[UP] >= self.swallow_at:
                self._swallowed |= self._writers
            limit = self.cut_at[direction]
            if limit is not None and self.passed[direction] >= limit:
                self.cut_at[direction] = None
                self._cut()
            if self.bytes_per_second is not None:
                await asyncio.sleep(len(data) / self.bytes_per_second)
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    def _run(self, started: threading.Event, ended: asyncio.Event) -> None:
        async def run() -> None:
            server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
            host, port = server.sockets[0].getsockname()
            self.address = f"{host}:{port}"
            started.set()
            await ended.wait()
            server.close()
            self._cut()
            await asyncio.gather(*self._serving, return_exceptions=True)

        self._loop.run_until_complete(run())
        self._loop.close()


@contextmanager
def proxy_to(target: str) -> Iterator[Proxy]:
    """A proxy before host:port, in a thread of its own."""
    proxy = Proxy(target)
    started, ended = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=proxy._run, args=(started, ended))
    thread.start()
    assert started.wait(10)
    try:
        yield proxy
    finally:
        proxy._loop.call_soon_threadsafe(ended.set)
        thread.join()
