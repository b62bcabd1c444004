"""`captionserve serve`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from captionserve_server.cli.console import messages, print_json
from captionserve_server.cli.settings_options import with_settings
from captionserve_server.serving.logs import configure_logs
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.serving.service import serve as run_service
from captionserve_server.settings import Settings


@with_settings
def serve(
    settings: Settings,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as JSON, and end.")
    ] = False,
) -> None:
    """Serve captions over gRPC until SIGTERM or SIGINT."""
    if print_config:
        print_json(settings.model_dump(mode="json"))
        return
    configure_logs(settings.log_format)
    messages.print("starting Triton")
    asyncio.run(run_service(settings, _announce))
    messages.print("stopped")


def _announce(report: ReadyReport) -> None:
    messages.print(f"serving captions on {report.grpc}, metrics on http://{report.metrics}/metrics")


def reload(
    ready_file: Annotated[
        Path, typer.Option(help="The ready file of the service.", exists=True, dir_okay=False)
    ],
) -> None:
    """Have a service take in new versions of its model repository, certificates and tokens."""
    report = ReadyReport(**json.loads(ready_file.read_text()))
    os.kill(report.pids["gateway"], signal.SIGHUP)
