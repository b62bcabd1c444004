"""A checkpoint exported and served for as long as it is needed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.ready import ReadyReport


@contextmanager
def exported_checkpoint(checkpoint: str, progress: Callable[[str], None]) -> Iterator[Path]:
    """Export a checkpoint into a temporary folder, a model repository.

    Args:
        checkpoint: a local folder in Hugging Face layout, or a hub id.
        progress: told what begins.
    """
    # Imported here: only who exports needs PyTorch.
    from captionserve_server.export.logs import quiet_libraries
    from captionserve_server.export.repository import export_checkpoint

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="captionserve-repository-") as folder:
        export_checkpoint(checkpoint, Path(folder), progress=progress)
        yield Path(folder)


@contextmanager
def served_checkpoint(
    checkpoint: str, progress: Callable[[str], None], *extra_arguments: str
) -> Iterator[ReadyReport]:
    """Export a checkpoint and serve it on free loopback ports.

    Args:
        checkpoint: as for `exported_checkpoint`.
        progress: likewise.
        extra_arguments: more arguments of `captionserve serve`.
    """
    with exported_checkpoint(checkpoint, progress) as folder:
        progress("starting Triton and the gateway")
        with launched_service(folder, *extra_arguments) as service:
            yield service
