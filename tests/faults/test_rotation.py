"""Certificates and tokens that are replaced while callers call: no call of theirs fails."""

from __future__ import annotations

import signal
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from captionserve_server.gateway.tokens import create_token, revoke_tokens

from tests.certificates import CertificateFiles, Pair, certificate_pem, issued, key_pem
from tests.faults import load
from tests.faults.served import Served, assert_ended_well, serving, wait_until
from tests.pictures import png
from tests.reference import picture

NAME = "projected"
CALLERS = 4
# After each change, all callers have made new connections.
CALLS_AFTER = 5 * CALLERS


@dataclass
class Callers:
    """Who calls all the time, each call over a connection of its own, and none made again."""

    served: Served
    files: CertificateFiles
    token: str
    certificate: Pair
    codes: Counter[str] = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)
    _request: bytes = field(default_factory=lambda: load.request_of(png(picture(1))))

    def call(self, token: str, certificate: Pair) -> grpc.StatusCode:
        """How a call with a token and a client's certificate ends."""
        target, credentials = self.served.report["grpc"], self.files.credentials(certificate)
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(target, credentials, options) as channel:
            call: Any = channel.unary_unary(load.METHOD)
            metadata = (("authorization", f"Bearer {token}"),)
            try:
                call(self._request, timeout=30, metadata=metadata)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
            return grpc.StatusCode.OK

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Call while the block runs."""

        def again_and_again() -> None:
            while not self.ended.is_set():
                self.codes[self.call(self.token, self.certificate).name] += 1

        threads = [threading.Thread(target=again_and_again) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.ended.set()
            for thread in threads:
                thread.join()

    def go_on(self) -> None:
        """Wait until they have called a few times more."""
        before = self.codes.total()
        wait_until(lambda: self.codes.total() >= before + CALLS_AFTER)

    def served_certificate(self) -> str:
        """What new connections are shown."""
        host, _, port = self.served.report["grpc"].rpartition(":")
        return ssl.get_server_certificate((host, int(port)))


def test_certificates_and_tokens_are_replaced_under_load(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    files = CertificateFiles(tmp_path)
    token, authority = create_token(files.tokens, "alice"), issued("authority of clients")
    files.client_ca.write_bytes(certificate_pem(authority))
    arguments = (
        *("--tls-certificate", str(files.certificate), "--tls-key", str(files.key)),
        *("--tls-client-ca", str(files.client_ca)),
        *("--tokens", str(files.tokens)),
    )
    with serving(model_repository(NAME), tmp_path, *arguments) as served:
        callers = Callers(served, files, token, issued("alice", authority))
        with callers.calling():
            callers.go_on()
            replace_certificate(callers)
            replace_token(callers)
            replace_authority_of_clients(callers, authority)
            replace_by_signal(callers)
        assert set(callers.codes) == {"OK"}, callers.codes
        assert_ended_well(served)


def replace_certificate(callers: Callers) -> None:
    """One that cannot be used, and then one that can."""
    files, before = callers.files, callers.served_certificate()
    files.key.write_bytes(key_pem(issued("another")))
    refused = "the new certificate is refused, the old one stays"
    wait_until(lambda: refused in callers.served.log.read_text(errors="replace"))
    callers.go_on()
    assert callers.served_certificate() == before
    new = issued("server", files.authority)
    files.write(new)
    wait_until(lambda: callers.served_certificate() == certificate_pem(new).decode())
    callers.go_on()


def replace_token(callers: Callers) -> None:
    """A new token, that callers take from when it is known; then the old one is refused."""
    old, tokens = callers.token, callers.files.tokens
    new = create_token(tokens, "alice")
    wait_until(lambda: callers.call(new, callers.certificate) is grpc.StatusCode.OK)
    callers.token = new
    callers.go_on()
    assert revoke_tokens(tokens, "alice", keep_newest=True) == 1
    wait_until(lambda: callers.call(old, callers.certificate) is grpc.StatusCode.UNAUTHENTICATED)
    callers.go_on()


def replace_authority_of_clients(callers: Callers, old: Pair) -> None:
    """Both vouch while callers change; then whom the old one vouches for is turned away."""
    path, new = callers.files.client_ca, issued("new authority of clients")
    before, after = callers.certificate, issued("alice", new)
    path.write_bytes(certificate_pem(old) + certificate_pem(new))
    wait_until(lambda: callers.call(callers.token, after) is grpc.StatusCode.OK)
    callers.certificate = after
    callers.go_on()
    path.write_bytes(certificate_pem(new))
    wait_until(lambda: callers.call(callers.token, before) is grpc.StatusCode.UNAVAILABLE)
    callers.go_on()


def replace_by_signal(callers: Callers) -> None:
    """SIGHUP takes in all of it, and the model repository, which starts another Triton."""
    new = issued("server", callers.files.authority)
    callers.files.write(new)
    triton = callers.served.report["pids"]["triton"]
    callers.served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: callers.served_certificate() == certificate_pem(new).decode())
    wait_until(lambda: callers.served.report["pids"]["triton"] != triton)
    callers.go_on()


@pytest.mark.parametrize("wrong", ["--tls-certificate", "--tls-key", "--tokens"])
def test_what_cannot_be_read_ends_the_service_before_it_begins(
    wrong: str, model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    files = CertificateFiles(tmp_path)
    create_token(files.tokens, "alice")
    paths = {"--tls-certificate": files.certificate, "--tls-key": files.key}
    paths["--tokens"] = files.tokens
    paths[wrong] = tmp_path / "no such file"
    arguments = [word for name, path in paths.items() for word in (name, str(path))]
    with serving(model_repository(NAME), tmp_path, *arguments) as served:
        assert served.process.wait() == 1
        said = served.log.read_text()
        assert "error: " in said
        assert "Traceback" not in said
        assert not served.ready_file.exists()
