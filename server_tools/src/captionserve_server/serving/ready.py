"""The ready file: how a running service tells others where it listens."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ReadyReport:
    """The ready file's content: where a service listens, each host:port, and its processes."""

    grpc: str
    metrics: str
    triton_grpc: str
    triton_http: str
    triton_metrics: str
    pids: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def ready_file(path: Path | None, report: ReadyReport) -> Iterator[None]:
    """Keep the report in a file while the service runs; None keeps none."""
    if path is None:
        yield
        return
    # Written beside and renamed, so that nobody reads half a file.
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(asdict(report), indent=2) + "\n")
    draft.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
