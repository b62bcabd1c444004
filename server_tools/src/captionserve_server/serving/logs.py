"""What a service writes about itself: lines for a person, or JSON for a machine, on stderr.

Everything goes through Python's logging, so that libraries' lines have the same form; what is bound
to a call, its request id and identity, is in every line that is written for it.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

# gRPC's own logger of a server's calls, and how it words that an answer could not be sent.
_GRPC_LOGGER = "grpc._cython.cygrpc"
_CALLER_GONE = "ExecuteBatchError"

LogFormat = Literal["text", "json"]


def configure_logs(log_format: LogFormat) -> None:
    """Write all lines from now on in this form."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logging.getLogger(_GRPC_LOGGER).addFilter(_is_news)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("captionserve_server").setLevel(logging.INFO)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether gRPC says more than that a caller has gone, as the call's own line does."""
    return _CALLER_GONE not in record.getMessage()
