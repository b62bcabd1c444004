"""The whole service in one process tree: this process is the gateway, Triton is its child."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captionserve_server.core.decode_budget import DEFAULT_DECODE_MEGABYTES
from captionserve_server.core.errors import CaptionServeError
from captionserve_server.gateway.config import GatewayConfig
from captionserve_server.gateway.decoder_client import DecoderClient, TimeLimit
from captionserve_server.gateway.kserve import InputTensor, encode_strings
from captionserve_server.gateway.server import Gateway
from captionserve_server.runtime.model_repository import what_is_missing
from captionserve_server.serving.installation import find_triton
from captionserve_server.serving.ready import ReadyReport, ready_file
from captionserve_server.serving.triton_process import TritonProcess, TritonStartError
from captionserve_server.triton import wire

# One black pixel as a binary PPM: the smallest image there is.
_CANARY_IMAGE = b"P6 1 1 255\n\0\0\0"


class TritonEndedError(RuntimeError):
    """Triton, or one of its models' processes, ended while it was serving; its last lines."""


class NoModelRepositoryError(RuntimeError):
    """What is to be served is no model repository that this version can serve; says what to do."""


@dataclass(frozen=True)
class ServeOptions:
    """What `captionserve serve` is asked for.

    Attributes:
        model_repository: an exported model repository.
        listen: host:port of the gateway; port 0 takes any free one.
        metrics_listen: host:port of the gateway's Prometheus metrics.
        ready_file: written as JSON once captions can be answered, removed at the end.
        tritonserver: the tritonserver executable; None finds one.
        cache_megabytes: memory for answers that may be asked for again; 0 for none.
        threads: of one run of a graph; 0 follows from the cores there are.
        decode_megabytes: memory of all images that are decoded at once.
        start_seconds: how long Triton may take to load its models.
        grace_seconds: how long calls in flight may take at the end.
    """

    model_repository: Path
    listen: str = "127.0.0.1:9000"
    metrics_listen: str = "127.0.0.1:0"
    ready_file: Path | None = None
    tritonserver: Path | None = None
    cache_megabytes: int = 64
    threads: int = 0
    decode_megabytes: int = DEFAULT_DECODE_MEGABYTES
    start_seconds: float = 300.0
    grace_seconds: float = 30.0


async def serve(options: ServeOptions, on_ready: Callable[[ReadyReport], None]) -> None:
    """Run the service until SIGTERM or SIGINT.

    Args:
        options: what to run.
        on_ready: told once that captions can be answered.

    Raises:
        NoModelRepositoryError: if the model repository is none, or an older export's.
        TritonNotFoundError: if there is no tritonserver.
        TritonStartError: if it does not become ready.
        TritonEndedError: if it ends by itself later.
    """
    wrong = what_is_missing(options.model_repository)
    if wrong:
        raise NoModelRepositoryError(wrong)
    stop = _stop_on_signals()
    async with _triton(options, stop) as triton:
        if stop.is_set():
            return
        await _caption_once(triton, options.start_seconds)
        async with _gateway(options, triton) as gateway:
            report = _report(gateway, triton)
            with ready_file(options.ready_file, report):
                on_ready(report)
                await _until_stopped(stop, triton)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@contextlib.asynccontextmanager
async def _triton(options: ServeOptions, stop: asyncio.Event) -> AsyncIterator[TritonProcess]:
    triton = TritonProcess(
        find_triton(options.tritonserver),
        options.model_repository,
        threads=options.threads,
        decode_megabytes=options.decode_megabytes,
    )
    try:
        await _first(triton.wait_ready(options.start_seconds), stop.wait())
        yield triton
    finally:
        await asyncio.to_thread(triton.stop)


async def _caption_once(triton: TritonProcess, timeout_seconds: float) -> None:
    """Prove with a real caption that Triton is ready; it says so before anything has decoded."""
    client = DecoderClient(triton.addresses.grpc)
    image = InputTensor(wire.IMAGE, (1,), encode_strings([_CANARY_IMAGE]))
    try:
        await client.caption([image], TimeLimit(timeout_seconds, timeout_seconds))
    except CaptionServeError as error:
        raise TritonStartError(f"the first caption failed: {error.message}") from error
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def _gateway(options: ServeOptions, triton: TritonProcess) -> AsyncIterator[Gateway]:
    gateway = Gateway(
        GatewayConfig(
            listen=options.listen,
            metrics_listen=options.metrics_listen,
            triton_address=triton.addresses.grpc,
            cache_megabytes=options.cache_megabytes,
            grace_seconds=options.grace_seconds,
        )
    )
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


async def _until_stopped(stop: asyncio.Event, triton: TritonProcess) -> None:
    ended = asyncio.create_task(triton.wait_ended())
    try:
        await asyncio.wait(
            [ended, asyncio.ensure_future(stop.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        if not stop.is_set():
            raise TritonEndedError(await ended)
    finally:
        ended.cancel()


async def _first(*coroutines: Coroutine[Any, Any, object]) -> None:
    """Wait until one is done, cancel the others, and raise what that one raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()


def _report(gateway: Gateway, triton: TritonProcess) -> ReadyReport:
    return ReadyReport(
        grpc=gateway.address,
        metrics=gateway.metrics_address,
        triton_grpc=triton.addresses.grpc,
        triton_http=triton.addresses.http,
        triton_metrics=triton.addresses.metrics,
        pids={"gateway": os.getpid(), "triton": triton.pid},
    )
