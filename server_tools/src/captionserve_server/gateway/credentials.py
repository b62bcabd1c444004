"""The server's certificates: checked before anything is loaded, and taken anew when they change."""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

_log = logging.getLogger(__name__)


class CertificateError(OSError):
    """A certificate or key that cannot be used; says which setting and why."""


@dataclass(frozen=True)
class CertificatePaths:
    """Where the files lie.

    Attributes:
        certificate: the server's chain, PEM.
        key: its private key, PEM, without a password.
        client_ca: certificates that vouch for clients, PEM; None asks clients for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None


@dataclass(frozen=True)
class _Pair:
    certificate: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime.datetime

    @property
    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self.key, self.certificate)], self.client_ca
        )


class ServerCertificates:
    """The present pair of certificate and key.

    gRPC asks for it at each handshake, in threads of its own; connections that stand stay as they
    are. A new pair that cannot be used is refused and said, and the last one kept.
    """

    def __init__(self, paths: CertificatePaths) -> None:
        """Read the files.

        Raises:
            CertificateError: if they cannot be used.
        """
        self._paths = paths
        self._lock = threading.Lock()
        self._seen = self._state()
        self._pair = self._given = _read(paths)

    @property
    def expires(self) -> datetime.datetime:
        """When the present certificate ends."""
        return self._pair.expires

    def credentials(self) -> grpc.ServerCredentials:
        """What a server listens with."""
        return grpc.dynamic_ssl_server_credentials(
            self._pair.configuration,
            # None leaves it as it is, which the type stubs do not know.
            cast("Callable[[], grpc.ServerCertificateConfiguration]", self._changed_configuration),
            require_client_authentication=self._paths.client_ca is not None,
        )

    def refresh(self) -> None:
        """Take in files that have changed."""
        with self._lock:
            state = self._state()
            if state == self._seen:
                return
            self._seen = state
            try:
                self._pair = _read(self._paths)
            except CertificateError as error:
                _log.error("the new certificate is refused, the old one stays: %s", error)
                return
        _log.info("a new certificate is used, which ends at %s", self._pair.expires)

    def _changed_configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC shall take from now on; None leaves it as it is."""
        self.refresh()
        with self._lock:
            if self._pair is self._given:
                return None
            self._given = self._pair
            return self._pair.configuration

    def _state(self) -> tuple[Any, ...]:
        """What changes when a file does; of one that is not there for a moment, that."""
        paths = (self._paths.certificate, self._paths.key, self._paths.client_ca)
        return tuple(map(_stat, filter(None, paths)))


def _stat(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(paths: CertificatePaths) -> _Pair:
    certificate = _content(paths.certificate, "--tls-certificate")
    key = _content(paths.key, "--tls-key")
    client_ca = None if paths.client_ca is None else _content(paths.client_ca, "--tls-client-ca")
    try:
        chain = x509.load_pem_x509_certificates(certificate)
    except ValueError as error:
        raise CertificateError("--tls-certificate is no PEM certificate") from error
    if client_ca is not None:
        try:
            x509.load_pem_x509_certificates(client_ca)
        except ValueError as error:
            raise CertificateError("--tls-client-ca is no PEM certificate") from error
    try:
        public_key = load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError("--tls-key is no PEM key without a password") from error
    if public_key != chain[0].public_key():
        raise CertificateError("--tls-key is not the key of --tls-certificate")
    now = datetime.datetime.now(datetime.timezone.utc)
    if chain[0].not_valid_after_utc <= now:
        raise CertificateError(f"--tls-certificate has ended at {chain[0].not_valid_after_utc}")
    return _Pair(certificate, key, client_ca, chain[0].not_valid_after_utc)


def _content(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{setting} cannot be read: {error.strerror}") from error
