"""Where the `captionserve` command begins: says what to install where only the edge mode is."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line; see cli/main.py."""
    if os.getpid() == 1:
        # From the first process of a container the kernel keeps every signal that has no handler;
        # that of serve stands only after the imports, and nobody asks a second time.
        signal.signal(signal.SIGTERM, _end)
    # Else gRPC remarks on standard error that a connection has ended.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        if sys.argv[1:2] == ["health"]:
            from captionserve_server.cli.health import main as run_health

            run_health(sys.argv[2:])
            return
        from captionserve_server.cli.main import main as run
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: {error.name} is missing; the captionserve command comes with "
            "captionserve-server[service], without it there is captionserve_server.local only"
        )
    run()


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
