"""Where the `captionserve` command begins: says what to install where only the edge mode is."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; see cli/main.py."""
    try:
        from captionserve_server.cli.main import main as run
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: {error.name} is missing; the captionserve command comes with "
            "captionserve-server[service], without it there is captionserve_server.local only"
        )
    run()
