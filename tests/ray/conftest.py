"""A Ray cluster of this machine, and the command that uses it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.faults.served import wait_until

ENVIRONMENT = Path(__file__).parents[2] / "build" / "ray"
# Set by `make test-ray`.
WANTED_VARIABLE = "TEST_RAY"
CORES = 2
END_SECONDS = 60.0


@dataclass(frozen=True)
class Ray:
    """Ray's environment.

    Attributes:
        temporary: where Ray keeps its sockets and logs.
        address: of a cluster, HOST:PORT.
        token: lets its processes and the command speak with each other.
    """

    temporary: Path
    address: str
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of everything that uses it."""
        return {
            **os.environ,
            "RAY_TMPDIR": str(self.temporary),
            "COLUMNS": "1000",
            # Else Ray makes a token and keeps it in the home folder.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }

    def start(self, *arguments: str | Path, address: str | None = "") -> subprocess.Popen[str]:
        """Start `captionserve bulk-ray` on the cluster, another one or, with None, its own."""
        command = [ENVIRONMENT / "bin" / "captionserve", "bulk-ray", *arguments]
        if address is not None:
            command += ["--address", address or self.address]
        return subprocess.Popen(
            list(map(str, command)),
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str | Path, address: str | None = "") -> tuple[int, str]:
        """Run it to its end: its exit status, and what it said."""
        process = self.start(*arguments, address=address)
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    def actors(self) -> list[psutil.Process]:
        """The processes that caption."""
        return [each for each in self.processes() if "ray::MapWorker" in command_of(each)]

    def processes(self) -> list[psutil.Process]:
        """All processes of any Ray in this environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("RAY_TMPDIR") == str(self.temporary):
                    found.append(process)
        return found


def command_of(process: psutil.Process) -> str:
    """What it was started as, or calls itself; empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="session")
def ray() -> Iterator[Ray]:
    """A cluster until the end of all tests."""
    if not os.environ.get(WANTED_VARIABLE):
        pytest.skip("Ray is not installed; `make test-ray` installs it")
    program = ENVIRONMENT / "bin" / "ray"
    # Not below pytest's folder: a socket's path may have a hundred characters.
    temporary = Path(tempfile.mkdtemp(prefix="ray-"))
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    cluster = Ray(temporary, f"127.0.0.1:{port}")
    head = subprocess.Popen(
        [
            *(program, "start", "--head", "--block", "--disable-usage-stats"),
            *("--node-ip-address", "127.0.0.1", "--port", str(port)),
            *("--num-cpus", str(CORES), "--object-store-memory", str(100 * 2**20)),
            *("--include-dashboard", "false"),
        ],
        env=cluster.variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: can_connect(port) or head.poll() is not None)
        yield cluster
    finally:
        # Asked to end they take half a minute.
        for process in cluster.processes():
            process.kill()
        head.wait(END_SECONDS)
        wait_until(lambda: not cluster.processes())
        shutil.rmtree(temporary)


def can_connect(port: int) -> bool:
    """Whether somebody listens at a port."""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
