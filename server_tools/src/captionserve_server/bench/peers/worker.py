"""A system in a process of its own, so that its memory and its threads are its own as well."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from captionserve_server.bench.rows import Captioner, Load, Options, Run

_loaded: list[Captioner] = []
"""In the process of a worker, its captioner."""


def _load(load: Callable[[], Captioner]) -> tuple[int, dict[str, str]]:
    # Ctrl-C is for the benchmark, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print and warn; what they print must not get among the benchmark's tables.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    _loaded.append(load())
    return os.getpid(), _loaded[0].versions


def _run(images: int, load: Load, options: Options) -> Run:
    return _loaded[0].run(images, load, options)


class WorkerPeer:
    """Drives a captioner in another process.

    Attributes:
        pid: the process.
        versions: of what the captioner is made of.
    """

    def __init__(self, pool: ProcessPoolExecutor, load: Callable[[], Captioner]) -> None:
        """Wait until it is loaded; raises what loading raises."""
        self._pool = pool
        self.pid, self.versions = pool.submit(_load, load).result()

    def run(self, images: int, load: Load, options: Options) -> Run:
        """Have images captioned; raises what that raises."""
        return self._pool.submit(_run, images, load, options).result()


@contextmanager
def running_worker(load: Callable[[], Captioner]) -> Iterator[WorkerPeer]:
    """A worker, ended on leaving in the middle of whatever it does.

    Args:
        load: makes the captioner, in the worker's process; it has to be picklable.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        peer = WorkerPeer(pool, load)
        try:
            yield peer
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(peer.pid, signal.SIGTERM)
