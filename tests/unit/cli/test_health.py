"""`captionserve health` against real health servers: what it prints, and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from captionserve_server.cli.health import reachable
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.certificates import CertificateFiles

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
Servers = Callable[..., str]


@pytest.fixture
def server() -> Iterator[Servers]:
    """Starts a server whose supervisor lives, and which serves or not; its address."""
    started = []

    def start(
        *,
        host: str = "127.0.0.1",
        status: int = SERVING,
        credentials: grpc.ServerCredentials | None = None,
    ) -> str:
        servicer = health.HealthServicer()
        servicer.set("", status)
        servicer.set("live", SERVING)
        server = grpc.server(ThreadPoolExecutor(1))
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        address = f"{host}:0"
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        server.start()
        started.append(server)
        return f"{host}:{port}"

    yield start
    for each in started:
        each.stop(None)


def asked(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`captionserve health`, as the console script runs it."""
    return subprocess.run(
        [
            *(sys.executable, "-c", "from captionserve_server.cli.entry import main; main()"),
            *("health", *arguments),
        ],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_who_serves_is_healthy(server: Servers) -> None:
    answer = asked("--target", server())
    assert (answer.returncode, answer.stdout) == (0, "SERVING\n")


def test_who_does_not_serve_is_unhealthy_but_live(server: Servers) -> None:
    target = server(status=NOT_SERVING)
    answer = asked("--target", target)
    assert (answer.returncode, answer.stdout) == (1, "NOT_SERVING\n")
    assert asked("--target", target, "--service", "live").returncode == 0


def test_an_unknown_name_is_unhealthy(server: Servers) -> None:
    answer = asked("--target", server(), "--service", "lives")
    assert answer.returncode == 1
    assert "NOT_FOUND" in answer.stderr


def test_nobody_there_is_unhealthy_within_the_time(server: Servers) -> None:
    answer = asked("--target", "127.0.0.1:1", "--timeout", "1")
    assert answer.returncode == 1
    assert answer.stderr == (
        "error: UNAVAILABLE: nobody listens at this address: is the service started, and is this "
        "its port?\n"
    )


def test_the_servers_own_variable_says_where_to_ask(server: Servers) -> None:
    answer = asked(CAPTIONSERVE_HEALTH_LISTEN=server(host="0.0.0.0"))
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("listens", "asked_at"),
    [
        ("0.0.0.0:9001", "127.0.0.1:9001"),
        ("[::]:9001", "[::1]:9001"),
        ("10.0.0.7:9001", "10.0.0.7:9001"),
        ("gateway:9001", "gateway:9001"),
    ],
)
def test_who_listens_everywhere_is_asked_here(listens: str, asked_at: str) -> None:
    assert reachable(listens) == asked_at


def test_a_service_with_tls_is_asked_with_its_authority(server: Servers, tmp_path: Path) -> None:
    files = CertificateFiles(tmp_path)
    pair = files.key.read_bytes(), files.certificate.read_bytes()
    target = server(credentials=grpc.ssl_server_credentials([pair]))
    assert asked("--target", target, "--tls-ca", str(files.ca)).returncode == 0
    assert asked("--target", target, "--timeout", "1").returncode == 1


def test_it_is_among_the_commands_and_needs_few_imports() -> None:
    code = (
        "import sys, captionserve_server.cli.health\n"
        "sys.exit(any(name in sys.modules for name in ('pydantic', 'numpy', 'tritonclient')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    listed = subprocess.run(
        [sys.executable, "-m", "captionserve_server.cli.main", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert " health " in listed.stdout
