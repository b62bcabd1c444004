"""Traces: spans of calls and of the stages of captions, sent by OpenTelemetry where that is wanted.

A caller's W3C trace context is continued. OpenTelemetry is an extra; without an endpoint nothing of
it is imported, and nothing is recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from captionserve_server.core.engine.timeline import Stage

if TYPE_CHECKING:
    from opentelemetry.trace import Span

OTLP_ENDPOINT_VARIABLE = "CAPTIONSERVE_OTLP_ENDPOINT"
"""Environment variable with the endpoint, for the processes of Triton."""

TRACE_HEADERS = ("traceparent", "tracestate")
"""Metadata of a call that carry its trace context."""

_SEND_SECONDS = 2
_CLOSE_MILLISECONDS = 3000


class TracingNotInstalledError(RuntimeError):
    """An endpoint is given, and OpenTelemetry is not installed; says what to do."""


class Traces:
    """Records the spans of one process."""

    def __init__(self, endpoint: str | None, service: str) -> None:
        """Begin to send, in a thread of its own; what cannot be sent in time is dropped.

        Args:
            endpoint: where to, OTLP over gRPC: http://host:port; None records nothing.
            service: how this process is called there.

        Raises:
            TracingNotInstalledError: if there is an endpoint, but no OpenTelemetry.
        """
        self._provider = None
        if endpoint is None:
            return
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise TracingNotInstalledError(
                "traces need OpenTelemetry: pip install 'captionserve-server[tracing]'"
            ) from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        exporter = OTLPSpanExporter(endpoint, timeout=_SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))

    @contextmanager
    def call(self, service: str, method: str, carrier: Mapping[str, str]) -> Iterator[Span | None]:
        """Record a call that the block answers, as a part of the caller's trace.

        Args:
            service: its full name, as RPCs have it.
            method: its name.
            carrier: may have TRACE_HEADERS.
        """
        if self._provider is None:
            yield None
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        # The semantic conventions of RPCs.
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
        with self._provider.get_tracer(__name__).start_as_current_span(
            f"{service}/{method}",
            context=extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            # An exception's text is not for everybody's eyes.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    def stages(self, stages: Iterable[Stage]) -> None:
        """Record stages that have passed, as parts of the present call."""
        if self._provider is None:
            return
        tracer = self._provider.get_tracer(__name__)
        for stage in stages:
            begin = int(1e9 * stage.begin)
            tracer.start_span(stage.name, start_time=begin).end(begin + int(1e9 * stage.seconds))

    def close(self) -> None:
        """Send what has been recorded, within some seconds."""
        if self._provider is not None:
            self._provider.force_flush(_CLOSE_MILLISECONDS)
            self._provider.shutdown()


def record_code(span: Span | None, code: int) -> None:
    """Say how a call has ended: a gRPC status code."""
    if span is None:
        return
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("rpc.grpc.status_code", code)
    if code:
        span.set_status(Status(StatusCode.ERROR))


def endpoint_for_models() -> str | None:
    """Where Triton's processes send their spans, if anywhere."""
    return os.environ.get(OTLP_ENDPOINT_VARIABLE) or None
