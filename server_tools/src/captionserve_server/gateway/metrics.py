"""The gateway's Prometheus metrics, on an HTTP port of their own."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, MetricsHandler

# Seconds; a caption takes from a tenth of a second to some seconds under load.
_LATENCY_BUCKETS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0)
# How often the metrics' server looks whether it shall end, which is what `stop` waits for.
_POLL_SECONDS = 0.05


_log = logging.getLogger(__name__)


@dataclass
class CallRecord:
    """What is to be remembered of one call.

    Attributes:
        code: how it ended.
    """

    code: grpc.StatusCode = grpc.StatusCode.OK


class GatewayMetrics:
    """Counts calls; each gateway has a registry of its own.

    Attributes:
        registry: holds all of them.
        cache_hits: answers that were remembered.
        cache_joined: answers that were computed for another call.
        cache_bytes: of the remembered answers.
    """

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
        self.cache_hits = Counter(
            "captionserve_cache_hits",
            "Caption calls answered from memory.",
            registry=self.registry,
        )
        self.cache_joined = Counter(
            "captionserve_cache_joined",
            "Caption calls answered by the work for an identical call.",
            registry=self.registry,
        )
        self.cache_bytes = Gauge(
            "captionserve_cache_bytes", "Memory of remembered answers.", registry=self.registry
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
            seconds = time.perf_counter() - begin
            self._in_flight.dec()
            self._latency.observe(seconds)
            self._requests.labels(record.code.name).inc()
            fields = {"code": record.code.name, "seconds": round(seconds, 4)}
            _log.info("call", extra=fields)


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
        self._server = _http_server(host.strip("[]"), int(port), MetricsHandler.factory(registry))
        self.address = f"{host}:{self._server.server_port}"
        # prometheus_client's own start_http_server polls twice a second.
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop serving; waits for the server's thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _http_server(host: str, port: int, handler: type[MetricsHandler]) -> ThreadingHTTPServer:
    """A server that listens already, on IPv6 where the host is such an address or has no other."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]

    class Server(ThreadingHTTPServer):
        address_family = family

    return Server((str(address[0]), port), handler)
