"""transformers' generate() in a process of its own, and optimum's in an environment of its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from captionserve_server.bench.peers import generate_worker
from captionserve_server.bench.peers.optimum_environment import export_model, optimum_python
from captionserve_server.bench.peers.worker import WorkerPeer, running_worker

_WORKER = generate_worker.__file__


def transformers_peer(checkpoint: str, images: Path) -> AbstractContextManager[WorkerPeer]:
    """PyTorch and transformers in float32.

    Args:
        checkpoint: a local folder or a hub id.
        images: a folder of JPEG files.
    """
    command = [sys.executable, _WORKER, "transformers", checkpoint, checkpoint, str(images)]
    return running_worker(command)


@contextmanager
def optimum_peer(checkpoint: str, images: Path, environment: Path) -> Iterator[WorkerPeer]:
    """ONNX Runtime under optimum's ORTModelForVision2Seq, in float32.

    Args:
        checkpoint: a local folder or a hub id.
        images: a folder of JPEG files.
        environment: its virtual environment, kept for the next time.

    Raises:
        PeerError: if optimum cannot be installed or cannot export the checkpoint.
    """
    python = optimum_python(environment)
    with tempfile.TemporaryDirectory(prefix="captionserve-optimum-") as model:
        export_model(python, checkpoint, Path(model))
        command = [python, _WORKER, "optimum", checkpoint, model, str(images)]
        with running_worker(command) as worker:
            yield worker
