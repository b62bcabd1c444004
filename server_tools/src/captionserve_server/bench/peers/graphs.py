"""Our graphs in a bare loop, in a process of its own."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

from captionserve_server.bench.peers.worker import WorkerPeer, running_worker

_MODULE = "captionserve_server.bench.peers.graphs_worker"


def graphs_peer(
    repository: Path, images: Path, encode_batch: int
) -> AbstractContextManager[WorkerPeer]:
    """The graphs of an exported model repository.

    Args:
        repository: the model repository.
        images: a folder of JPEG files.
        encode_batch: images encoded at once.
    """
    command = [sys.executable, "-m", _MODULE, str(repository), str(images), str(encode_batch)]
    return running_worker(command)
