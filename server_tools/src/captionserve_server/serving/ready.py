"""The ready file: how a running service tells others where it listens."""

from __future__ import annotations

import json
import os
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
    health: str | None = None
    pids: dict[str, int] = field(default_factory=dict)


class ReadyFile:
    """Keeps the newest report in a file, from the first one until it is removed."""

    def __init__(self, path: Path | None) -> None:
        """Keep it there; None keeps none."""
        self._path = path

    def write(self, report: ReadyReport) -> None:
        """Put this report in the place of the last one."""
        if self._path is None:
            return
        said = {name: value for name, value in asdict(report).items() if value is not None}
        # Written beside and renamed, so that nobody reads half a file.
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        draft.write_text(json.dumps(said, indent=2) + "\n")
        draft.replace(self._path)

    def close(self) -> None:
        """Say that the service has ended."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
