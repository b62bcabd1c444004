"""The trace that a call is made in, for the service to go on with.

OpenTelemetry's API says it, where it is installed and somebody records a trace.
"""

from __future__ import annotations

try:
    from opentelemetry.propagate import inject
except ImportError:

    def trace_context() -> tuple[tuple[str, str], ...]:
        """No metadata: nobody can be recording."""
        return ()

else:

    def trace_context() -> tuple[tuple[str, str], ...]:
        """The metadata that name the present span, such as traceparent; none outside of one."""
        carrier: dict[str, str] = {}
        inject(carrier)
        return tuple(carrier.items())
