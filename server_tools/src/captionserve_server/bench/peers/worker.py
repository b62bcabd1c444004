"""A system in a process of its own, so that its memory and its threads are its own as well."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from captionserve_server.bench.peers.system import Load, Options, Peer, Run, System

_loaded: list[System] = []
"""In the process of a worker, its system."""


@contextmanager
def running_worker(load: Callable[[], System]) -> Iterator[Peer]:
    """A worker, ended on leaving in the middle of whatever it does.

    What fails in it, loading or captioning, is raised here.

    Args:
        load: makes the system, in the worker's process; it has to be picklable.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pid = pool.submit(_load, load).result()
        try:
            yield Peer(pid, lambda *asked: pool.submit(_run, *asked).result())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _load(load: Callable[[], System]) -> int:
    # Ctrl-C is for the benchmark, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Libraries print and warn; what they print must not get among the benchmark's tables.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    _loaded.append(load())
    return os.getpid()


def _run(files: list[bytes], load: Load, options: Options) -> Run:
    return _loaded[0].run(files, load, options)
