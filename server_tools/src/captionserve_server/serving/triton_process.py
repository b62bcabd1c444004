"""One tritonserver process: started on free ports, watched until ready, ended without remains."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from captionserve_server.core.decode_budget import DEFAULT_DECODE_MEGABYTES
from captionserve_server.runtime.cores import THREADS_VARIABLE
from captionserve_server.runtime.decode_memory import DECODE_MEGABYTES_VARIABLE
from captionserve_server.serving.installation import TritonInstallation, assemble_backends
from captionserve_server.serving.private_copy import copy_repository, make_plain_folder

_LOOPBACK = "127.0.0.1"
_SHARED_MEMORY = Path("/dev/shm")
_POLL_SECONDS = 0.1
_LOG_TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1
# Has malloc ask for transparent huge pages, and give a picture's memory back, which Pillow takes in
# blocks of 16 MiB: glibc's own threshold rises to what was freed, and each thread then keeps the
# largest picture it ever had. Other C libraries ignore it, and older ones the first.
_MALLOC = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={15 << 20}",
        f"glibc.malloc.trim_threshold={16 << 20}",
    )
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
    """A running tritonserver of our own."""

    def __init__(
        self,
        installation: TritonInstallation,
        repository: Path,
        *,
        threads: int = 0,
        decode_megabytes: int = DEFAULT_DECODE_MEGABYTES,
        exit_seconds: int = 30,
    ) -> None:
        """Start the server; use `wait_ready` before relying on it.

        Args:
            installation: what to run.
            repository: the model repository; Triton serves a copy of it.
            threads: of one run of a graph; 0 follows from the cores there are.
            decode_megabytes: memory of all images that are decoded at once.
            exit_seconds: how long Triton may take to end its models before it is killed.

        Raises:
            NoPlainFolderError: if there is no place for the copy.
        """
        self._exit_seconds = exit_seconds
        self._folder = make_plain_folder("captionserve-triton-")
        self._log_path = self._folder / "triton.log"
        self._shared_memory_prefix = self._folder.name
        ports = _free_ports(3)
        self.addresses = TritonAddresses(*(f"{_LOOPBACK}:{port}" for port in ports))
        environment = _environment(installation) | {
            THREADS_VARIABLE: str(threads),
            DECODE_MEGABYTES_VARIABLE: str(decode_megabytes),
        }
        backends = self._folder / "backends"
        served = self._folder / "repository"
        # Whoever gets no process cannot end it, which would remove its folder.
        with ExitStack() as undo:
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            backends.mkdir()
            assemble_backends(installation, backends)
            copy_repository(repository, served)
            self._process = self._start(installation.binary, served, backends, ports, environment)
            undo.pop_all()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Wait until every model is loaded and warmed up.

        Raises:
            TritonStartError: if the process ends or the time is up first.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        async with grpc.aio.insecure_channel(self.addresses.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while not await _is_ready(stub):
                if not self.running:
                    raise TritonStartError(f"Triton ended while starting\n{self._log_tail()}")
                if asyncio.get_running_loop().time() > deadline:
                    raise TritonStartError(
                        f"Triton was not ready after {timeout_seconds:g} seconds\n"
                        f"{self._log_tail()}"
                    )
                await asyncio.sleep(_POLL_SECONDS)

    async def wait_ended(self) -> str:
        """Wait until Triton has ended, or a process of its models, which it does not notice.

        Returns:
            which it was, and the last lines of Triton's log.
        """
        processes = {self.pid: "Triton", **dict.fromkeys(_children(self.pid), "a model's process")}
        ended: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as watched:
            for pid, name in processes.items():
                try:
                    descriptor = os.pidfd_open(pid)
                except ProcessLookupError:
                    return self._ended(name)
                watched.callback(os.close, descriptor)
                loop.add_reader(descriptor, ended.put_nowait, name)
                watched.callback(loop.remove_reader, descriptor)
            return self._ended(await ended.get())

    def _ended(self, name: str) -> str:
        return f"{name} ended by itself\n{self._log_tail()}"

    def stop(self) -> None:
        """End the server and remove whatever it leaves behind."""
        if self.running:
            self._process.terminate()
            # Triton itself waits exit_seconds for its models; it gets a little more to say goodbye.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._exit_seconds + 5)
        # The stubs are in the process group of their own that `_start` made.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for region in _SHARED_MEMORY.glob(f"{self._shared_memory_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(
        self,
        binary: Path,
        repository: Path,
        backends: Path,
        ports: list[int],
        environment: Mapping[str, str],
    ) -> subprocess.Popen[bytes]:
        command = [
            str(binary),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory_prefix}",
            f"--exit-timeout-secs={self._exit_seconds}",
            # Every config.pbtxt is complete. To complete one, Triton starts a Python model one time
            # more, which takes seconds; and if that process dies, it waits for it for ever.
            "--disable-auto-complete-config",
            f"--grpc-address={_LOOPBACK}",
            f"--http-address={_LOOPBACK}",
            f"--metrics-address={_LOOPBACK}",
            f"--grpc-port={ports[0]}",
            f"--http-port={ports[1]}",
            f"--metrics-port={ports[2]}",
        ]
        with self._log_path.open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _log_tail(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("E")] or lines
        return "\n".join(errors[-_LOG_TAIL_LINES:])


def _children(pid: int) -> list[int]:
    """The processes that a process has started."""
    tasks = Path("/proc", str(pid), "task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


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
    With huge pages a lone step, which reads all weights for a few rows, takes 7 % less in int8. The
    environment's own settings come last and prevail.
    """
    libraries = [str(folder) for folder in installation.library_folders]
    return os.environ | {
        "GLIBC_TUNABLES": _joined(_MALLOC, os.environ.get("GLIBC_TUNABLES", "")),
        "LD_LIBRARY_PATH": _joined(*libraries, os.environ.get("LD_LIBRARY_PATH", "")),
        "PATH": _joined(str(Path(sys.executable).parent), os.environ.get("PATH", "")),
    }


def _joined(*folders: str) -> str:
    return os.pathsep.join(filter(None, folders))


def _die_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; all are held until all are found, so that they differ."""
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(_bound_socket()).getsockname()[1] for _ in range(count)]


@contextlib.contextmanager
def _bound_socket() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind((_LOOPBACK, 0))
        yield listener
