"""The gateway's Prometheus metrics, on an HTTP port of their own.

docs/metrics.md is made from them.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from typing import NamedTuple

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    MetricsHandler,
    ProcessCollector,
    disable_created_metrics,
)
from structlog.contextvars import get_contextvars

from captionserve_server.core.engine.timeline import Stage
from captionserve_server.gateway.stages import first_token_seconds

# Seconds; a caption takes from some hundredths of a second to some seconds under load.
_CALL_BUCKETS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0)
# A stage may take less than a thousandth.
_STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# How often the metrics' server looks whether it shall end, which is what `stop` waits for.
_POLL_SECONDS = 0.05
# Of a call that was refused before anybody knew whose it was.
_NOBODY = ""

SHOWN = {
    "admitted": "Calls and items that room was made for.",
    "request_bytes": "Memory reserved for the requests of those.",
    "turns": "Captions that the decoder is asked for at once, at most.",
    "working": "Captions that the decoder is asked for now.",
    "waiting": "Captions that wait for their turn at the decoder.",
    "cache_bytes": "Memory of remembered answers.",
}
"""What is asked for when the metrics are read, and what each is."""

_log = logging.getLogger(__name__)


@dataclass
class CallRecord:
    """What is to be remembered of one call.

    Attributes:
        code: how it ended.
    """

    code: grpc.StatusCode = grpc.StatusCode.OK


class Described(NamedTuple):
    """What a metric is, for docs/metrics.md."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str


class GatewayMetrics:
    """What a gateway counts; each has a registry of its own.

    Attributes:
        registry: holds all of them, and what the process itself uses.
        described: what each of them is.
        cache_hits: answers that were remembered.
        cache_joined: answers that were computed for another call.
        tokens: that were generated.
        restarts: of Triton.
        serving: whether captions can be answered.
        certificate_expiry: when the server's certificate ends, in seconds since 1970.
    """

    def __init__(self) -> None:
        """Begin at zero."""
        # When each counter was made is one more series of each, and nobody's question.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.described: list[Described] = []
        self.registry = CollectorRegistry()
        ProcessCollector("captionserve", registry=self.registry)
        self._requests = self._counter(
            "requests",
            "Calls that have ended, by method, gRPC status code and identity. An item of "
            "CaptionMany is a call of the method CaptionMany.item.",
            "method",
            "code",
            "identity",
        )
        self._latency = self._histogram(
            "request_seconds", "Time from a call's arrival to its end.", _CALL_BUCKETS, "method"
        )
        self._in_flight = self._gauge("requests_in_flight", "Calls now, by method.", "method")
        self._stages = self._histogram(
            "stage_seconds", "Time of a caption in each stage.", _STAGE_BUCKETS, "stage"
        )
        self._first_token = self._histogram(
            "first_token_seconds",
            "Time from a caption's wait for its turn to its first token.",
            _CALL_BUCKETS,
        )
        self.tokens = self._counter("tokens", "Tokens of the captions that were computed.")
        self.cache_hits = self._counter("cache_hits", "Caption calls answered from memory.")
        self.cache_joined = self._counter(
            "cache_joined", "Caption calls answered by the work for an identical call."
        )
        self.restarts = self._counter("restarts", "Times that Triton has failed.")
        self.serving = self._gauge("serving", "1 while captions can be answered, else 0.")
        self.certificate_expiry = self._gauge(
            "certificate_expiry_timestamp_seconds",
            "When the server's certificate ends, in seconds since 1970; 0 without TLS.",
        )

    def show(self, values: Mapping[str, Callable[[], float]]) -> None:
        """Ask these whenever the metrics are read; all of SHOWN, by its names."""
        for name, text in SHOWN.items():
            self._gauge(name, text).set_function(values[name])

    @contextmanager
    def call(self, method: str) -> Iterator[CallRecord]:
        """Count the call that the block handles, and log it; the block records how it failed."""
        record = CallRecord()
        begin = time.perf_counter()
        in_flight = self._in_flight.labels(method)
        in_flight.inc()
        try:
            yield record
        finally:
            seconds = time.perf_counter() - begin
            in_flight.dec()
            self._latency.labels(method).observe(seconds)
            # Bound when the caller was known, for the lines that are logged.
            identity = get_contextvars().get("identity", _NOBODY)
            self._requests.labels(method, record.code.name, identity).inc()
            fields = {"method": method, "code": record.code.name, "seconds": round(seconds, 4)}
            _log.info("call", extra=fields)

    def caption(self, stages: Sequence[Stage], tokens: int) -> None:
        """Count a caption that was computed.

        Args:
            stages: that it has passed, in their order.
            tokens: that were generated.
        """
        for stage in stages:
            self._stages.labels(stage.name).observe(stage.seconds)
        self._first_token.observe(first_token_seconds(stages))
        self.tokens.inc(tokens)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        full = self._described(f"{name}_total", "counter", text, labels)
        return Counter(full, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        full = self._described(name, "gauge", text, labels)
        return Gauge(full, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        full = self._described(name, "histogram", text, labels)
        return Histogram(full, text, labels, buckets=buckets, registry=self.registry)

    def _described(self, name: str, kind: str, text: str, labels: tuple[str, ...]) -> str:
        described = Described(f"captionserve_{name}", kind, labels, text)
        self.described.append(described)
        return described.name


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
