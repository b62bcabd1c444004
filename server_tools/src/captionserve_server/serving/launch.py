"""Running `captionserve serve` as a child process: what the demo, benchmarks and tests do."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from captionserve_server.serving.ready import ReadyReport

_POLL_SECONDS = 0.05
_STOP_SECONDS = 90.0


class LaunchError(RuntimeError):
    """The service did not start; the message ends with what it printed."""


@contextmanager
def launched_service(
    model_repository: Path, *extra_arguments: str, timeout_seconds: float = 300.0
) -> Iterator[ReadyReport]:
    """A service on free loopback ports, ended with SIGTERM on leaving.

    Args:
        model_repository: an exported model repository.
        extra_arguments: more arguments of `captionserve serve`.
        timeout_seconds: how long it may take to become ready.

    Raises:
        LaunchError: if it ends or is not ready in time.
    """
    with tempfile.TemporaryDirectory(prefix="captionserve-launch-") as folder:
        ready_file, log_file = Path(folder) / "ready.json", Path(folder) / "log"
        command = [
            *(sys.executable, "-m", "captionserve_server.cli.main", "serve"),
            *("--model-repository", str(model_repository)),
            *("--listen", "127.0.0.1:0", "--ready-file", str(ready_file)),
            *extra_arguments,
        ]
        with log_file.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(ready_file, process, log_file, timeout_seconds)
            yield ReadyReport(**json.loads(ready_file.read_text()))
        finally:
            _end(process)


def _wait_for(
    ready_file: Path, process: subprocess.Popen[bytes], log_file: Path, timeout_seconds: float
) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not ready_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.terminate()
            raise LaunchError(f"the service did not start\n{log_file.read_text(errors='replace')}")
        time.sleep(_POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
