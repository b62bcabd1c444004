"""One tritonserver process: started on free ports, watched until ready, ended without remains."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from captionserve_server.runtime.heartbeat import HEARTBEAT_FOLDER_VARIABLE
from captionserve_server.serving.installation import TritonInstallation
from captionserve_server.serving.malloc import TRITON_TUNABLES
from captionserve_server.serving.private_folder import PrivateFolder
from captionserve_server.serving.process_watch import ProcessWatch
from captionserve_server.serving.triton_log import TritonLog
from captionserve_server.tracing import TRACE_HEADERS

_LOOPBACK = "127.0.0.1"
_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.05
# How long Triton waits for its models, and what it gets beyond that to say goodbye. All calls have
# ended by then, but Triton may keep a request that was cancelled, and waits for it in vain.
_EXIT_SECONDS = 10
_GOODBYE_SECONDS = 5
END_SECONDS = _EXIT_SECONDS + _GOODBYE_SECONDS
"""How long a Triton takes to end, at most; what a container gets for its end follows from it."""
# What callers of Triton itself may say to models: of which trace they are.
_TRACE_HEADERS = f"({'|'.join(TRACE_HEADERS)})"
# Becomes the program that it is given, and has the kernel end that with the thread that started it,
# which is the service's main one. Not a preexec_fn: that runs Python between fork and exec, where a
# lock may be held by one of the gateway's threads that the fork has left behind.
_DIES_WITH_PARENT = (
    "import ctypes, os, signal, sys; "
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM); "  # PR_SET_PDEATHSIG
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class TritonStartError(RuntimeError):
    """Triton ended, or did not become ready in time; the message ends with its last errors."""


@dataclass(frozen=True)
class TritonAddresses:
    """Where a Triton process listens, each as host:port."""

    grpc: str
    http: str
    metrics: str


class TritonProcess:
    """A running tritonserver of our own.

    Attributes:
        addresses: where it listens.
        pid: the process id.
    """

    def __init__(
        self,
        installation: TritonInstallation,
        folder: PrivateFolder,
        log: TritonLog,
        environment: Mapping[str, str],
    ) -> None:
        """Start the server; use `wait_ready` before relying on it.

        Args:
            installation: what to run.
            folder: what to serve.
            log: takes what it prints.
            environment: what its models are told, beside where their signs of life go.
        """
        self._log = log
        ports = _free_ports(3)
        self.addresses = TritonAddresses(*(f"{_LOOPBACK}:{port}" for port in ports))
        heartbeats = {HEARTBEAT_FOLDER_VARIABLE: str(folder.heartbeats)}
        self._process = self._start(
            installation.binary,
            folder,
            ports,
            {**_environment(installation), **environment, **heartbeats},
        )
        self.pid = self._process.pid
        self._watch = ProcessWatch(self.pid, folder.heartbeats)
        self._killed = False

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Wait until every model is loaded and warmed up.

        Raises:
            TritonStartError: if a process ends or the time is up first.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        async with grpc.aio.insecure_channel(self.addresses.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while not await _is_ready(stub):
                self._watch.find_models()
                if self._process.poll() is not None:
                    raise TritonStartError(f"Triton ended while starting\n{self._log.tail()}")
                if (seen := self._watch.look()) is not None:
                    raise TritonStartError(f"{seen}, while Triton started\n{self._log.tail()}")
                if asyncio.get_running_loop().time() > deadline:
                    raise TritonStartError(
                        f"Triton was not ready after {timeout_seconds:g} seconds\n"
                        f"{self._log.tail()}"
                    )
                await asyncio.sleep(_POLL_SECONDS)
        self._watch.find_models()

    async def failure(self) -> str:
        """Wait until Triton, or a process of its models, cannot answer any more; what happened."""
        return await self._watch.failure()

    async def stop(self, hurry: asyncio.Event) -> None:
        """End the server and its models within a quarter of a minute, or when `hurry` is set."""
        if self._watch.look() is None:
            self._process.terminate()
            # A Triton that has lost a model would wait for it in vain.
            waiting = asyncio.create_task(hurry.wait())
            deadline = asyncio.get_running_loop().time() + END_SECONDS
            while (
                self._process.poll() is None
                and not waiting.done()
                and asyncio.get_running_loop().time() < deadline
            ):
                await asyncio.wait([waiting], timeout=_POLL_SECONDS)
            waiting.cancel()
        self.kill()

    def kill(self) -> None:
        """End the server and its models at once."""
        if self._killed:  # Its process group may be another's by now.
            return
        self._killed = True
        # The stubs are in the process group of their own that `_start` made, and fall to us when
        # Triton is gone. What has not been waited for may still hold its memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-self.pid, 0)

    def _start(
        self,
        binary: Path,
        folder: PrivateFolder,
        ports: list[int],
        environment: Mapping[str, str],
    ) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-I", "-S", "-c", _DIES_WITH_PARENT),
            str(binary),
            f"--model-repository={folder.repository}",
            f"--backend-directory={folder.backends}",
            f"--backend-config=python,shm-region-prefix-name={folder.shared_memory_prefix}",
            f"--exit-timeout-secs={_EXIT_SECONDS}",
            # Every config.pbtxt is complete. To complete one, Triton starts a Python model one time
            # more, which takes seconds; and if that process dies, it waits for it for ever.
            "--disable-auto-complete-config",
            f"--grpc-header-forward-pattern={_TRACE_HEADERS}",
            f"--http-header-forward-pattern={_TRACE_HEADERS}",
            f"--grpc-address={_LOOPBACK}",
            f"--http-address={_LOOPBACK}",
            f"--metrics-address={_LOOPBACK}",
            f"--grpc-port={ports[0]}",
            f"--http-port={ports[1]}",
            f"--metrics-port={ports[2]}",
        ]
        _adopt_orphans()
        output = self._log.pipe()
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(output)


def _adopt_orphans() -> None:
    """Have children of a child that has ended become ours, wherever an init process is far."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


async def _is_ready(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> bool:
    try:
        answer = await stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=1.0)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.ready)


def _environment(installation: TritonInstallation) -> dict[str, str]:
    """This process's environment, with what Triton and the stubs need to find.

    The stub embeds a Python of its own. It ignores PYTHONPATH and PYTHONHOME, but looks for
    `python3` on PATH and takes the virtual environment that it finds there, which must be this one.
    The environment's own settings come last and prevail.
    """
    libraries = [str(folder) for folder in installation.library_folders]
    return os.environ | {
        "GLIBC_TUNABLES": _joined(TRITON_TUNABLES, os.environ.get("GLIBC_TUNABLES", "")),
        "LD_LIBRARY_PATH": _joined(*libraries, os.environ.get("LD_LIBRARY_PATH", "")),
        "PATH": _joined(str(Path(sys.executable).parent), os.environ.get("PATH", "")),
    }


def _joined(*folders: str) -> str:
    return os.pathsep.join(filter(None, folders))


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; all are held until all are found, so that they differ."""
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(_bound_socket()).getsockname()[1] for _ in range(count)]


@contextlib.contextmanager
def _bound_socket() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        yield listener
