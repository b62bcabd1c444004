"""Keeps a Triton running for the gateway: starts it, notices when it fails, starts it anew.

    started     processes live, every model is loaded, and a caption has come back -> SERVING
    failed      a process has ended, is stopped or gives no sign of life, or captions stay away:
                NOT_SERVING, calls in flight fail at once, all of Triton is killed and tidied up,
                and started anew
    given up    after too many failures within a time

A model's process is not replaced alone: Triton does not let go of a model whose process has died,
and starting all of it takes hardly longer. New versions are taken in the same way, by a second
Triton beside the first (docs/adr/0017).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from captionserve_server.core.errors import CaptionServeError
from captionserve_server.gateway.decoder_client import DecoderClient
from captionserve_server.gateway.server import Gateway
from captionserve_server.runtime.cores import THREADS_VARIABLE
from captionserve_server.runtime.decode_memory import DECODE_MEGABYTES_VARIABLE
from captionserve_server.serving.installation import TritonInstallation
from captionserve_server.serving.private_folder import PrivateFolder
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.serving.triton_log import TritonLog
from captionserve_server.serving.triton_process import TritonProcess, TritonStartError
from captionserve_server.settings import Settings
from captionserve_server.tracing import OTLP_ENDPOINT_VARIABLE

_log = logging.getLogger(__name__)

# A caption is asked for when none has been answered for so long.
_QUIET_SECONDS = 5.0
# How long that one may take; a caption of one token, which joins the others in flight.
_CANARY_SECONDS = 10.0
# So often in a row it may fail.
_CANARIES = 2
# What the last answers of a Triton may take beyond the longest time that a call has.
_RETIRE_SECONDS = 5.0

First = TypeVar("First")
Second = TypeVar("Second")


@dataclass
class _Running:
    """A Triton, and the folder that it serves from."""

    folder: PrivateFolder
    triton: TritonProcess


class TritonEndedError(RuntimeError):
    """Triton has failed too often; the message has the last reason and Triton's last lines."""


class Supervisor:
    """Runs one Triton after the other."""

    def __init__(
        self,
        settings: Settings,
        installation: TritonInstallation,
        log: TritonLog,
        gateway: Gateway,
        on_ready: Callable[[ReadyReport], None],
    ) -> None:
        """Prepare; nothing is started before `run`.

        Args:
            settings: of the service.
            installation: which Triton to run.
            log: takes what it prints.
            gateway: is connected to each Triton that is ready, and told when it has failed.
            on_ready: told of each Triton that is ready.
        """
        self._settings = settings
        self._installation = installation
        self._log = log
        self._gateway = gateway
        self._on_ready = on_ready
        self._failures: collections.deque[float] = collections.deque()
        self._retiring: set[asyncio.Task[None]] = set()

    async def run(self, reload: asyncio.Event, hurry: asyncio.Event) -> None:
        """Keep a Triton running until the task is cancelled, which ends it.

        Args:
            reload: when set, what has changed is taken in: versions, certificates and tokens.
            hurry: when set, the end does not wait for Triton.

        Raises:
            TritonStartError: if the first one does not become ready.
            TritonEndedError: if it fails too often.
            NoPlainFolderError: if there is no place for Triton's files.
        """
        self._running = await self._new_folder()
        try:
            await self._make_ready(self._running)
            while True:
                reason = await self._until_failure(reload, hurry)
                await self._end(self._running)
                self._count(reason)
                await self._restart(self._running)
        except asyncio.CancelledError:
            decoder = await self._gateway.disconnect()
            if decoder is not None:
                # Triton waits for streams that are open.
                await decoder.close()
            await self._running.triton.stop(hurry)
            raise
        finally:
            for task in self._retiring:
                task.cancel()
            await asyncio.gather(*self._retiring, return_exceptions=True)
            await self._end(self._running)
            self._running.folder.close()

    async def _new_folder(self) -> _Running:
        """A Triton that is being started, from the model repository's present state."""
        repository = self._settings.model_repository
        folder = await asyncio.to_thread(PrivateFolder, self._installation, repository)
        try:
            return _Running(folder, self._start(folder))
        except BaseException:
            folder.close()
            raise

    def _start(self, folder: PrivateFolder) -> TritonProcess:
        environment = {
            THREADS_VARIABLE: str(self._settings.threads),
            DECODE_MEGABYTES_VARIABLE: str(self._settings.decode_megabytes),
            OTLP_ENDPOINT_VARIABLE: self._settings.otlp_endpoint or "",
        }
        return TritonProcess(self._installation, folder, self._log, environment)

    async def _restart(self, running: _Running) -> None:
        """Start Triton anew, from the same files, until it is ready or has failed too often."""
        while True:
            running.triton = self._start(running.folder)
            try:
                await self._make_ready(running)
                return
            except TritonStartError as error:
                await self._end(running)
                self._count(str(error))

    async def _make_ready(self, running: _Running) -> DecoderClient | None:
        """Wait until Triton is ready, and have the gateway ask it; whom it has asked until then.

        Raises:
            TritonStartError: if it does not become ready.
        """
        triton, seconds = running.triton, self._settings.start_seconds
        await triton.wait_ready(seconds)
        # Triton says that it is ready before anything has decoded.
        connecting = self._gateway.connect(triton.addresses.grpc, running.folder.versions, seconds)
        try:
            former = await _either(connecting, triton.failure())
        except CaptionServeError as error:
            raise TritonStartError(
                f"the first caption failed: {error.message}\n{self._log.tail()}"
            ) from error
        if isinstance(former, str):
            raise TritonStartError(f"{former}, before the first caption\n{self._log.tail()}")
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
        return former

    async def _until_failure(self, reload: asyncio.Event, hurry: asyncio.Event) -> str:
        """Wait until Triton has failed, taking in new states meanwhile; what has happened."""
        while True:
            failing = _either(self._running.triton.failure(), self._until_no_caption())
            failure = await _either(failing, reload.wait())
            if isinstance(failure, str):
                return failure
            reload.clear()
            self._gateway.refresh()
            await self._take_in(hurry)

    async def _take_in(self, hurry: asyncio.Event) -> None:
        """Serve the model repository's present state, if all of it can be.

        A second Triton is started beside the one that serves, so that nothing has changed until
        each version has given a caption; the former one ends when its calls have.
        """
        running = self._running
        try:
            new = await self._new_folder()
        except OSError as error:
            _log.error("the model repository is not taken in: %s", error)
            return
        try:
            former = await _either(self._make_ready(new), running.triton.failure())
            if isinstance(former, str):
                raise TritonStartError(f"{former}, while a new state was taken in")
        except BaseException as error:
            await asyncio.to_thread(new.triton.kill)
            new.folder.close()
            if not isinstance(error, TritonStartError):
                raise
            _log.error("the model repository's new state is not taken in: %s", error)
            return
        self._running = new
        _log.info("serving versions %s", ", ".join(map(str, new.folder.versions)))
        retiring = asyncio.create_task(self._retire(running, former, hurry))
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)

    async def _retire(
        self, running: _Running, client: DecoderClient | None, hurry: asyncio.Event
    ) -> None:
        """End a Triton that is not asked any more, once it has answered what it was asked."""
        try:
            if client is not None:
                # No call lasts longer than the cap.
                answered = asyncio.wait_for(
                    client.wait_idle(), self._settings.deadline_cap_seconds + _RETIRE_SECONDS
                )
                with contextlib.suppress(asyncio.TimeoutError):
                    await _either(answered, running.triton.failure())
        finally:
            if client is not None:
                await client.close()
            await running.triton.stop(hurry)
            running.folder.close()

    async def _end(self, running: _Running) -> None:
        """End a Triton that has failed, and have its calls fail."""
        decoder = await self._gateway.disconnect()
        await asyncio.to_thread(running.triton.kill)
        if decoder is not None:
            # Behind the kill: a Triton that is stopped would not end its streams.
            await decoder.close()
        running.folder.tidy()

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
        self._gateway.metrics.restarts.inc()
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
    first: Coroutine[Any, Any, First] | asyncio.Future[First],
    second: Coroutine[Any, Any, Second],
) -> First | Second:
    """The result of whichever ends first; the other is cancelled."""
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(each) for each in (first, second)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        result: First | Second = next(task for task in tasks if task in done).result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        # Whatever the other one raises is of no interest any more.
        await asyncio.gather(*tasks, return_exceptions=True)
