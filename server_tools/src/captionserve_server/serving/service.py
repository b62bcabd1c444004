"""The whole service in one process tree: this process is the gateway, Triton is its child."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from captionserve_server.gateway.server import Gateway
from captionserve_server.runtime.model_repository import what_is_missing
from captionserve_server.serving.installation import find_triton
from captionserve_server.serving.malloc import give_requests_back
from captionserve_server.serving.ready import ReadyFile, ReadyReport
from captionserve_server.serving.supervisor import Supervisor
from captionserve_server.serving.triton_log import TritonLog
from captionserve_server.settings import Settings


class NoModelRepositoryError(RuntimeError):
    """What is to be served is no model repository that this version can serve; says what to do."""


@dataclass(frozen=True)
class _Signals:
    """What signals have asked for.

    Attributes:
        end: set by the first SIGTERM or SIGINT.
        hurry: set by the second.
        reload: set by SIGHUP.
    """

    end: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    reload: asyncio.Event = field(default_factory=asyncio.Event)

    def obey(self) -> None:
        """Begin to listen."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked)

    def _asked(self) -> None:
        (self.hurry if self.end.is_set() else self.end).set()


async def serve(settings: Settings, on_ready: Callable[[ReadyReport], None]) -> None:
    """Run the service until SIGTERM or SIGINT.

    SIGHUP takes in the model repository's present state, certificates and tokens.

    The end: NOT_SERVING, a wait for balancers, no new calls, the calls in flight, Triton. A second
    signal cuts every wait short.

    Args:
        settings: what to run, and how.
        on_ready: told where the service listens, once captions can be answered.

    Raises:
        NoModelRepositoryError: if the model repository is none, or an older export's.
        TritonNotFoundError: if there is no tritonserver.
        TritonStartError: if it does not become ready.
        TritonEndedError: if it fails too often later.
        OSError: if an address cannot be listened on, or a file not be written.
    """
    wrong = what_is_missing(settings.model_repository)
    if wrong:
        raise NoModelRepositoryError(wrong)
    signals = _Signals()
    signals.obey()
    give_requests_back()
    ready = _Announcement(ReadyFile(settings.ready_file), on_ready)
    installation = find_triton(settings.tritonserver)
    with (
        contextlib.closing(TritonLog(settings.triton_log)) as log,
        contextlib.closing(ready.file),
    ):
        async with _gateway(settings) as gateway:
            supervisor = Supervisor(settings, installation, log, gateway, ready.tell)
            supervising = asyncio.create_task(supervisor.run(signals.reload, signals.hurry))
            ending = asyncio.create_task(signals.end.wait())
            try:
                await asyncio.wait([supervising, ending], return_when=asyncio.FIRST_COMPLETED)
                if not signals.end.is_set():
                    await supervising  # Which has failed.
                await gateway.drain(signals.hurry)
            finally:
                ending.cancel()
                supervising.cancel()
                # Ends Triton; what it has failed with was raised above.
                await asyncio.wait([supervising])


@dataclass
class _Announcement:
    """Tells of every Triton in the ready file, and of the first one to whoever started us."""

    file: ReadyFile
    first: Callable[[ReadyReport], None] | None

    def tell(self, report: ReadyReport) -> None:
        self.file.write(report)
        if self.first is not None:
            self.first(report)
            self.first = None


@contextlib.asynccontextmanager
async def _gateway(settings: Settings) -> AsyncIterator[Gateway]:
    gateway = Gateway(settings)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.close()
