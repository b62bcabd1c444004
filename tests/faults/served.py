"""A service of its own for a test, whose processes may be harmed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

WAIT_SECONDS = 60.0


def wait_until(condition: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """Wait for the condition, for so long at most."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


class Ports(NamedTuple):
    """Where a service listens, on whatever host; 0 is any."""

    grpc: int
    health: int


ANY = Ports(0, 0)


@dataclass
class Served:
    """The service's process, and what its ready file says."""

    process: subprocess.Popen[bytes]
    ready_file: Path
    log: Path

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.ready_file.read_text())
        return report

    @property
    def triton(self) -> psutil.Process:
        return psutil.Process(self.report["pids"]["triton"])

    def victim(self, name: str) -> psutil.Process:
        """Triton, or the process of one of its models."""
        if name == "Triton":
            return self.triton
        (found,) = [p for p in self.triton.children() if f"{name}_0" in " ".join(p.cmdline())]
        return found

    def end(self) -> str:
        """Ask it to end, and wait; what it has written."""
        self.process.terminate()
        self.process.wait(WAIT_SECONDS)
        return self.log.read_text(errors="replace")


def assert_ended_well(served: Served) -> str:
    """End the service; it has done nothing that it did not mean to. What it has written."""
    said = served.end()
    assert served.process.returncode == 0, said[-4000:]
    assert "Traceback" not in said, said[said.index("Traceback") - 1000 :][:4000]
    return said


@contextmanager
def serving(
    repository: Path, folder: Path, *arguments: str, host: str = "127.0.0.1", ports: Ports = ANY
) -> Iterator[Served]:
    """Serve, until it is ready or has ended by itself."""
    ready_file, log = folder / "ready.json", folder / "service.log"
    command = [
        *(sys.executable, "-m", "captionserve_server.cli.main", "serve"),
        *("--model-repository", str(repository), "--listen", f"{host}:{ports.grpc}"),
        *("--ready-file", str(ready_file), "--health-listen", f"{host}:{ports.health}"),
        *arguments,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until(lambda: ready_file.exists() or process.poll() is not None)
        yield Served(process, ready_file, log)
    finally:
        process.terminate()
        try:
            process.wait(WAIT_SECONDS)
        finally:
            process.kill()
