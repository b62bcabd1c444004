"""Keeps a Triton running for the gateway: starts it, notices when it fails, starts it anew.

    started     processes live, every model is loaded, and a caption has come back -> SERVING
    failed      a process has ended, is stopped or gives no sign of life, or captions stay away:
                NOT_SERVING, calls in flight fail at once, all of Triton is killed and tidied up,
                and started anew
    given up    after too many failures within a time

A model's process is not replaced alone. Triton does not let go of a model whose process has died,
and loading all of them takes hardly longer than one (docs/adr/0017).
"""

from __future__ import annotations

import asyncio
import collections
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from captionserve_server.core.errors import CaptionServeError
from captionserve_server.gateway.server import Gateway
from captionserve_server.serving.installation import TritonInstallation
from captionserve_server.serving.private_folder import PrivateFolder
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.serving.triton_log import TritonLog
from captionserve_server.serving.triton_process import TritonProcess, TritonStartError
from captionserve_server.settings import Settings

_log = logging.getLogger(__name__)

# A caption is asked for when none has been answered for so long.
_QUIET_SECONDS = 5.0
# How long that one may take; a caption of one token, which joins the others in flight.
_CANARY_SECONDS = 10.0
# So often in a row it may fail.
_CANARIES = 2

Result = TypeVar("Result")


class TritonEndedError(RuntimeError):
    """Triton has failed too often; the message has the last reason and Triton's last lines."""


class Supervisor:
    """Runs one Triton after the other."""

    def __init__(
        self,
        settings: Settings,
        installation: TritonInstallation,
        folder: PrivateFolder,
        log: TritonLog,
        gateway: Gateway,
        on_ready: Callable[[ReadyReport], None],
    ) -> None:
        """Prepare; nothing is started before `run`.

        Args:
            settings: of the service.
            installation: which Triton to run.
            folder: what it serves from.
            log: takes what it prints.
            gateway: is connected to each Triton that is ready, and told when it has failed.
            on_ready: told of each Triton that is ready.
        """
        self._settings = settings
        self._installation = installation
        self._folder = folder
        self._log = log
        self._gateway = gateway
        self._on_ready = on_ready
        self._failures: collections.deque[float] = collections.deque()

    async def run(self, hurry: asyncio.Event) -> None:
        """Keep a Triton running until the task is cancelled, which ends it.

        Args:
            hurry: when set, the end does not wait for Triton.

        Raises:
            TritonStartError: if the first one does not become ready.
            TritonEndedError: if it fails too often.
        """
        first = True
        while True:
            triton = self._start()
            try:
                await self._make_ready(triton)
                first = False
                reason = await self._until_failure(triton)
            except asyncio.CancelledError:
                # Triton waits for streams that are open.
                await self._gateway.disconnect()
                await triton.stop(hurry)
                raise
            except TritonStartError as error:
                if first:
                    raise
                reason = str(error)
            finally:
                await self._gateway.disconnect()
                await asyncio.to_thread(triton.kill)
                self._folder.tidy()
            self._count(reason)

    def _start(self) -> TritonProcess:
        return TritonProcess(
            self._installation,
            self._folder,
            self._log,
            threads=self._settings.threads,
            decode_megabytes=self._settings.decode_megabytes,
        )

    async def _make_ready(self, triton: TritonProcess) -> None:
        await triton.wait_ready(self._settings.start_seconds)
        self._gateway.connect(triton.addresses.grpc)
        # Triton says that it is ready before anything has decoded.
        proof = self._gateway.prove(self._settings.start_seconds)
        try:
            failure = await _either(proof, triton.failure())
        except CaptionServeError as error:
            raise TritonStartError(f"the first caption failed: {error.message}") from error
        if failure is not None:
            raise TritonStartError(f"{failure}, before the first caption\n{self._log.tail()}")
        await self._gateway.set_serving(True)
        self._on_ready(
            ReadyReport(
                grpc=self._gateway.address,
                metrics=self._gateway.metrics_address,
                health=self._gateway.health_address,
                triton_grpc=triton.addresses.grpc,
                triton_http=triton.addresses.http,
                triton_metrics=triton.addresses.metrics,
                pids={"gateway": os.getpid(), "triton": triton.pid},
            )
        )

    async def _until_failure(self, triton: TritonProcess) -> str:
        """What has happened to Triton, when it has."""
        return await _either(triton.failure(), self._until_no_caption())

    async def _until_no_caption(self) -> str:
        """Ask for captions while nobody else does, until they stay away; what to say then."""
        clock = asyncio.get_running_loop().time
        failed = 0
        while failed < _CANARIES:
            await asyncio.sleep(max(0.1, self._gateway.last_answer + _QUIET_SECONDS - clock()))
            asked = clock()
            if asked - self._gateway.last_answer < _QUIET_SECONDS:
                failed = 0
                continue
            try:
                await self._gateway.prove(_CANARY_SECONDS)
                failed = 0
            except CaptionServeError as error:
                # Others may have been answered meanwhile: then it is slow, and not dead.
                failed = 0 if self._gateway.last_answer >= asked else failed + 1
                _log.warning("a caption of our own failed: %s", error.message)
        return "Triton gives no captions any more"

    def _count(self, reason: str) -> None:
        """Remember a failure; TritonEndedError if there are too many."""
        now = asyncio.get_running_loop().time()
        self._failures.append(now)
        while self._failures[0] < now - self._settings.restart_window_seconds:
            self._failures.popleft()
        tail = self._log.tail()
        said = reason if tail in reason else f"{reason}\n{tail}"
        if len(self._failures) > self._settings.max_restarts:
            raise TritonEndedError(
                f"Triton has failed {len(self._failures)} times within "
                f"{self._settings.restart_window_seconds:g} seconds; the last time: {said}"
            )
        _log.error("%s; it is started anew", said)


async def _either(
    first: Coroutine[Any, Any, Result], second: Coroutine[Any, Any, str]
) -> Result | str:
    """The result of whichever ends first; the other is cancelled."""
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(each) for each in (first, second)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        result: Result | str = next(iter(done)).result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        # Whatever the other one raises is of no interest any more.
        await asyncio.gather(*tasks, return_exceptions=True)
