"""A temporary service for commands that need one, with a spinner while it starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from captionserve_server.cli.console import stages
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.serving.temporary import served_checkpoint


@contextmanager
def served_with_progress(checkpoint: str) -> Iterator[ReadyReport]:
    """Export and serve a checkpoint; the spinner ends when captions can be answered."""
    with ExitStack() as stack:
        with stages("loading the checkpoint") as progress:
            service = stack.enter_context(served_checkpoint(checkpoint, progress))
        yield service
