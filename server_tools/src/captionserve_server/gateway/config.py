"""The gateway's settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GatewayConfig:
    """How the gateway listens, whom it asks, and what it allows a caller.

    Attributes:
        triton_address: host:port of Triton's gRPC service.
        listen: host:port to serve on; port 0 takes any free one.
        metrics_listen: host:port of the Prometheus metrics; port 0 takes any free one.
        max_message_bytes: largest request and response; a larger one is RESOURCE_EXHAUSTED.
        max_concurrent_calls: captions in flight at once; one more is refused as OVERLOADED.
        max_streams_per_connection: calls at once on one connection; more wait at the caller.
        deadline_cap_seconds: longest time a caption may take, whatever the caller's deadline.
        cache_megabytes: memory for answers that may be asked for again, in MiB; with 0 none is
            remembered, and identical calls in flight are still computed once.
        connection_idle_seconds: a connection without calls is closed after this time.
        connection_age_seconds: a connection is replaced after this time, so that callers find new
            replicas; its calls may finish within deadline_cap_seconds.
        grace_seconds: how long calls in flight may take when the gateway stops.
    """

    triton_address: str
    listen: str = "127.0.0.1:9000"
    metrics_listen: str = "127.0.0.1:0"
    max_message_bytes: int = 64 * 1024 * 1024
    max_concurrent_calls: int = 256
    max_streams_per_connection: int = 256
    deadline_cap_seconds: float = 60.0
    cache_megabytes: int = 64
    connection_idle_seconds: float = 300.0
    connection_age_seconds: float = 600.0
    grace_seconds: float = 30.0
