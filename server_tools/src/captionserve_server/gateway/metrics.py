"""The gateway's Prometheus metrics, on an HTTP port of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

# Seconds; a caption takes from a tenth of a second to some seconds under load.
_LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0)


@dataclass
class CallRecord:
    """What is to be remembered of one call.

    Attributes:
        code: how it ended.
    """

    code: grpc.StatusCode = grpc.StatusCode.OK


class GatewayMetrics:
    """Counts calls; each gateway has a registry of its own."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "captionserve_requests",
            "Caption calls that ended, by gRPC status code.",
            ["code"],
            registry=self.registry,
        )
        self._latency = Histogram(
            "captionserve_request_seconds",
            "Time from a caption call's arrival to its end.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "captionserve_requests_in_flight", "Caption calls now.", registry=self.registry
        )

    @contextmanager
    def call(self) -> Iterator[CallRecord]:
        """Count the call that the block handles; the block records how it failed."""
        record = CallRecord()
        begin = time.perf_counter()
        self._in_flight.inc()
        try:
            yield record
        finally:
            self._in_flight.dec()
            self._latency.observe(time.perf_counter() - begin)
            self._requests.labels(record.code.name).inc()


class MetricsServer:
    """Serves a registry at http://host:port/metrics."""

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        """Start serving.

        Args:
            listen: host:port; port 0 takes any free one.
            registry: what to serve.

        Raises:
            OSError: if the address cannot be listened on.
        """
        host, _, port = listen.rpartition(":")
        self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        self.address = f"{host}:{self._server.server_port}"

    def stop(self) -> None:
        """Stop serving; waits for the server's thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
