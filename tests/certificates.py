"""Certificates for tests: authorities, servers and clients, made anew."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)
Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def issued(
    name: str, by: Pair | None = None, *, days: int = 1, host_names: Sequence[str] = ()
) -> Pair:
    """A certificate of a name, for 127.0.0.1 and hosts; without an issuer it is an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 3 * DAY)
        .not_valid_after(now + days * DAY)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [
                    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                    *map(x509.DNSName, host_names),
                ]
            ),
            critical=False,
        )
    )
    return builder.sign(key if by is None else by[1], hashes.SHA256()), key


def certificate_pem(pair: Pair) -> bytes:
    return pair[0].public_bytes(serialization.Encoding.PEM)


def key_pem(pair: Pair) -> bytes:
    return pair[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


class CertificateFiles:
    """An authority, and the files of a server that it vouches for."""

    def __init__(self, folder: Path) -> None:
        self.authority = issued("authority")
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        self.ca, self.client_ca = folder / "ca.pem", folder / "client-ca.pem"
        self.tokens = folder / "tokens"
        self.ca.write_bytes(certificate_pem(self.authority))
        self.write(issued("server", self.authority))

    def write(self, pair: Pair) -> None:
        self.certificate.write_bytes(certificate_pem(pair))
        self.key.write_bytes(key_pem(pair))

    @property
    def settings(self) -> dict[str, Any]:
        return {"tls_certificate": self.certificate, "tls_key": self.key}

    def credentials(self, client: Pair | None = None) -> grpc.ChannelCredentials:
        own = (None, None) if client is None else (key_pem(client), certificate_pem(client))
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), *own)
