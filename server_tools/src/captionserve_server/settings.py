"""The settings of a service: each is said once, and is a flag, a variable and its documentation.

The command line and docs/settings.md are derived from the fields; pydantic reads the variables,
CAPTIONSERVE_ and the field's name, and checks the values wherever they come from.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FilePath, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from captionserve_server.core.decode_budget import DEFAULT_DECODE_MEGABYTES

VARIABLE_PREFIX = "CAPTIONSERVE_"


def host_and_port(text: str) -> str:
    """A HOST:PORT as it was given; ValueError if it is none."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError("must be HOST:PORT")
    return text


Address = Annotated[str, AfterValidator(host_and_port)]


def _model_repository(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {folder}: `captionserve export CHECKPOINT --output {folder}` "
            "makes one"
        )
    return folder


ModelRepository = Annotated[Path, AfterValidator(_model_repository)]


class Settings(BaseSettings):
    """How a service runs; what is not given comes from the environment, else from here."""

    model_config = SettingsConfigDict(
        env_prefix=VARIABLE_PREFIX, env_ignore_empty=True, frozen=True, extra="forbid"
    )

    model_repository: ModelRepository = Field(description="Model repository written by export.")
    listen: Address = Field(
        "127.0.0.1:9000", description="HOST:PORT of the service; port 0 is any."
    )
    metrics_listen: Address = Field(
        "127.0.0.1:0", description="HOST:PORT of the Prometheus metrics."
    )
    health_listen: Address | None = Field(
        None, description="HOST:PORT of a plaintext server with health alone, for probes."
    )
    tls_certificate: Path | None = Field(
        None, description="The server's certificate chain, PEM; with --tls-key, TLS is spoken."
    )
    tls_key: Path | None = Field(None, description="The certificate's private key, PEM.")
    tls_client_ca: Path | None = Field(
        None, description="Certificates that vouch for clients, PEM; others are turned away."
    )
    tokens: Path | None = Field(
        None, description="File of `captionserve token`; calls need one of its tokens."
    )
    insecure: bool = Field(
        False,
        description="Listen on other addresses than loopback, although anybody could call or read.",
    )
    ready_file: Path | None = Field(
        None,
        description="Written as JSON once captions can be answered, and whenever it changes.",
    )
    tritonserver: FilePath | None = Field(
        None, description="tritonserver executable; else an installed one, or the embedded one."
    )
    triton_log: Path | None = Field(
        None,
        description="File that keeps all that Triton prints, rotated at 16 MiB, 3 older ones kept. "
        "Errors are in the service's own log in any case.",
    )
    otlp_endpoint: str | None = Field(
        None,
        description="Where traces are sent, OTLP over gRPC: http://host:port. Needs the extra "
        "'tracing'.",
    )
    threads: int = Field(
        0,
        ge=0,
        description="Threads of one run of a graph; 0 follows from affinity and control groups.",
    )
    cache_megabytes: int = Field(
        64,
        ge=0,
        description="Memory for answers that may be asked for again; 0 turns the cache off.",
    )
    cache_scope: Literal["identity", "all"] = Field(
        "identity",
        description="Whether an answer is remembered for the client that asked for it, or for all.",
    )
    decode_megabytes: int = Field(
        DEFAULT_DECODE_MEGABYTES,
        ge=1,
        description="Memory of all images that are decoded at once; one that takes more is decoded "
        "alone.",
    )
    max_message_megabytes: int = Field(
        64, ge=1, le=1024, description="Largest request and response; RESOURCE_EXHAUSTED beyond."
    )
    max_concurrent_calls: int = Field(
        256, ge=1, description="Captions in flight at once; one more is refused as OVERLOADED."
    )
    max_concurrent_per_client: int = Field(
        128, ge=1, description="Likewise of one client, as its token or certificate names it."
    )
    max_request_megabytes: int = Field(
        512, ge=1, description="Memory of all requests that are read, waiting or in work."
    )
    max_request_megabytes_per_client: int = Field(256, ge=1, description="Likewise of one client.")
    window: int = Field(
        64, ge=1, description="Items of a CaptionMany call that may be unanswered at a time."
    )
    max_streams_per_connection: int = Field(
        256, ge=1, description="Calls at once on one connection; more wait at the caller."
    )
    deadline_cap_seconds: float = Field(
        60.0, gt=0, description="Longest time a caption may take, whatever the caller's deadline."
    )
    handshake_seconds: float = Field(
        20.0, gt=0, description="A connection that has not begun TLS and HTTP/2 by then is closed."
    )
    keepalive_seconds: float = Field(
        20.0,
        ge=1,
        description="A client that has been silent for this time is asked whether it is there, and "
        "given up after as long again; its calls end.",
    )
    connection_idle_seconds: float = Field(
        300.0, gt=0, description="A connection without calls is closed after this time."
    )
    connection_age_seconds: float = Field(
        600.0,
        gt=0,
        description="A connection is replaced after this time, so that callers find new replicas; "
        "its calls may finish.",
    )
    start_seconds: float = Field(
        300.0, gt=0, description="Seconds that Triton may take to load its models."
    )
    max_restarts: int = Field(
        10, ge=0, description="Triton is started anew so often within --restart-window-seconds."
    )
    restart_window_seconds: float = Field(
        60.0, gt=0, description="After more restarts within this time the service ends."
    )
    balancer_seconds: float = Field(
        0.0,
        ge=0,
        description="At the end, seconds between NOT_SERVING and refusing calls, for balancers to "
        "turn away.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="At the end, seconds that calls in flight may take after that."
    )

    log_format: Literal["text", "json"] = Field(
        "text", description="Form of the service's own log, on stderr: text or json."
    )

    @model_validator(mode="after")
    def _check_security(self) -> Settings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("--tls-client-ca needs --tls-certificate and --tls-key")
        known = self.tls_client_ca is not None or self.tokens is not None
        if self.insecure or (self.tls_certificate is not None and known):
            return self
        if not is_loopback(self.listen):
            raise ValueError(
                f"--listen {self.listen} is open to others: give TLS, and tokens or a client CA; "
                "or --insecure, if something else keeps them out"
            )
        return self


def is_loopback(address: str) -> bool:
    """Whether a HOST:PORT can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
