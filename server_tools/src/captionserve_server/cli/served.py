"""A temporary service for commands that need one; says what it does from the start to the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from captionserve_server.cli.console import stages
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.serving.temporary import served_checkpoint


@contextmanager
def served_with_progress(checkpoint: str) -> Iterator[ReadyReport]:
    """Export and serve a checkpoint; the stages end when captions can be answered."""
    with ExitStack() as stack:
        with stages("importing PyTorch") as progress:
            service = stack.enter_context(served_checkpoint(checkpoint, progress))
        try:
            yield service
        finally:
            with stages("stopping the service"):
                stack.close()
