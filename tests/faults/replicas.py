"""Replicas of a service as Kubernetes runs them: each at an address of its own, all at one port."""

from __future__ import annotations

import itertools
import re
import socket
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from tests.faults.served import Ports, Served, assert_ended_well, serving, wait_until


class Secret:
    """Files that are replaced all at once, as those of a Secret that is mounted."""

    def __init__(self, folder: Path, content: Mapping[str, bytes]) -> None:
        self._folder = folder
        self._versions = itertools.count(1)
        self.replace(content)

    def path(self, name: str) -> Path:
        return self._folder / "data" / name

    def replace(self, content: Mapping[str, bytes]) -> None:
        """Have this content instead."""
        version = self._folder / f"version-{next(self._versions)}"
        version.mkdir(parents=True)
        for name, file in content.items():
            (version / name).write_bytes(file)
        link = self._folder / "link"
        link.symlink_to(version.name)
        link.replace(self._folder / "data")


def free_ports() -> Ports:
    """Ports that nobody has on any address of this machine."""
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("0.0.0.0", 0))
        return Ports(one.getsockname()[1], other.getsockname()[1])


@dataclass
class Replica:
    """A service that is one of several.

    Attributes:
        host: its address.
        served: its process.
        codes: with which its calls may have ended.
    """

    host: str
    served: Served
    codes: set[str]

    def is_ready(self) -> bool:
        """What a readiness probe finds."""
        with grpc.insecure_channel(self.served.report["health"]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def answered(self) -> Counter[str]:
        """How many calls it has answered well, by identity; a CaptionMany is one."""
        address = self.served.report["metrics"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples = [each for family in families for each in family.samples]
        answered: Counter[str] = Counter()
        for each in samples:
            labels = each.labels
            if each.name != "captionserve_requests_total" or labels["code"] != "OK":
                continue
            # An item of CaptionMany goes where its call has gone.
            if labels["method"] != "CaptionMany.item":
                answered[labels["identity"]] += int(each.value)
        return answered

    def kill(self) -> None:
        """Kill all of it at once, as when a container runs out of memory."""
        process = psutil.Process(self.served.process.pid)
        family = [process, *process.children(recursive=True)]
        for each in family:
            # Some end by themselves with their parent.
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self.served.process.wait()
        psutil.wait_procs(family)


class Deployment:
    """The replicas, and what finds those that are ready.

    Attributes:
        ready: who is to be found, the oldest first.
        ports: of each of them.
        seconds: how long each step took, by its name.
    """

    def __init__(
        self, running: ExitStack, repository: Path, folder: Path, ports: Ports, *arguments: str
    ) -> None:
        """Begin without replicas.

        Args:
            running: ends the replicas that still run.
            repository: what they serve.
            folder: for their files.
            ports: of each of them.
            arguments: likewise, beside those that say where they listen.
        """
        self.ready: list[Replica] = []
        self.seconds: dict[str, list[float]] = {}
        self._running = running
        self._repository = repository
        self._folder = folder
        self.ports = ports
        self._arguments = arguments
        self._told: list[Callable[[Collection[str]], None]] = []
        # 127.0.0.1 is for all that is not a replica.
        self._numbers = itertools.count(2)

    @property
    def hosts(self) -> list[str]:
        """Where those are who are to be found."""
        return [each.host for each in self.ready]

    def finds(self, tell: Callable[[Collection[str]], None]) -> None:
        """Have somebody told who is to be found, now and whenever it changes; until they know."""
        self._told.append(tell)
        tell(self.hosts)

    def start(self, host: str | None = None) -> Replica:
        """Start a replica, and wait until its probe succeeds; nobody finds it yet.

        Args:
            host: of one that was killed, and is started anew; None for a new one.
        """
        # Callers may still know the address of one that was killed, and ask it before it is ready.
        codes = {"OK"} if host is None else {"OK", "UNAVAILABLE"}
        with self._timed("start"):
            host = host or f"127.0.0.{next(self._numbers)}"
            folder = self._folder / f"{host}-{len(list(self._folder.glob(f'{host}-*')))}"
            folder.mkdir(parents=True)
            service = serving(
                self._repository, folder, *self._arguments, host=host, ports=self.ports
            )
            replica = Replica(host, self._running.enter_context(service), codes)
            wait_until(replica.is_ready)
        return replica

    def include(self, replica: Replica) -> None:
        self.ready.append(replica)
        self._tell()

    def exclude(self, replica: Replica) -> None:
        self.ready.remove(replica)
        self._tell()

    def end(self, replica: Replica) -> None:
        """End one that nobody finds any more; no call of all that it had has failed."""
        with self._timed("end"):
            said = assert_ended_well(replica.served)
        assert set(re.findall(r" code=(\w+)", said)) <= replica.codes, said[-4000:]

    def _tell(self) -> None:
        for tell in self._told:
            tell(self.hosts)

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds.setdefault(step, []).append(round(time.monotonic() - begin, 1))
