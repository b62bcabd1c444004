"""`captionserve serve`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from captionserve_server.cli.console import messages
from captionserve_server.core.decode_budget import DEFAULT_DECODE_MEGABYTES
from captionserve_server.runtime.decode_memory import DECODE_MEGABYTES_VARIABLE
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.serving.service import ServeOptions
from captionserve_server.serving.service import serve as run_service


def serve(
    model_repository: Annotated[
        Path,
        typer.Option(
            help="Model repository written by export.",
            exists=True,
            file_okay=False,
            envvar="CAPTIONSERVE_MODEL_REPOSITORY",
        ),
    ],
    listen: Annotated[
        str,
        typer.Option(help="HOST:PORT of the service; port 0 is any.", envvar="CAPTIONSERVE_LISTEN"),
    ] = "127.0.0.1:9000",
    metrics_listen: Annotated[
        str,
        typer.Option(
            help="HOST:PORT of the Prometheus metrics.", envvar="CAPTIONSERVE_METRICS_LISTEN"
        ),
    ] = "127.0.0.1:0",
    ready_file: Annotated[
        Path | None,
        typer.Option(help="Written as JSON once captions can be answered."),
    ] = None,
    tritonserver: Annotated[
        Path | None,
        typer.Option(
            help="tritonserver executable; by default an installed one, else the embedded one.",
            envvar="CAPTIONSERVE_TRITONSERVER",
        ),
    ] = None,
    cache_megabytes: Annotated[
        int,
        typer.Option(
            help="Memory for answers that may be asked for again; 0 turns the cache off.",
            min=0,
            envvar="CAPTIONSERVE_CACHE_MEGABYTES",
        ),
    ] = 64,
    threads: Annotated[
        int,
        typer.Option(
            help="Threads of one run of a graph; 0 follows from affinity and control groups.",
            min=0,
            envvar="CAPTIONSERVE_THREADS",
        ),
    ] = 0,
    decode_megabytes: Annotated[
        int,
        typer.Option(
            help="Memory of all images that are decoded at once; one that takes more is decoded "
            "alone.",
            min=1,
            envvar=DECODE_MEGABYTES_VARIABLE,
        ),
    ] = DEFAULT_DECODE_MEGABYTES,
    start_seconds: Annotated[
        float, typer.Option(help="Seconds that Triton may take to load its models.", min=1)
    ] = 300.0,
    grace_seconds: Annotated[
        float, typer.Option(help="Seconds that calls in flight may take at the end.", min=0)
    ] = 30.0,
) -> None:
    """Serve captions over gRPC until SIGTERM or SIGINT."""
    options = ServeOptions(
        model_repository=model_repository.resolve(),
        listen=listen,
        metrics_listen=metrics_listen,
        ready_file=ready_file,
        tritonserver=tritonserver,
        cache_megabytes=cache_megabytes,
        threads=threads,
        decode_megabytes=decode_megabytes,
        start_seconds=start_seconds,
        grace_seconds=grace_seconds,
    )
    messages.print("starting Triton")
    asyncio.run(run_service(options, _announce))
    messages.print("stopped")


def _announce(report: ReadyReport) -> None:
    messages.print(f"serving captions on {report.grpc}, metrics on http://{report.metrics}/metrics")
