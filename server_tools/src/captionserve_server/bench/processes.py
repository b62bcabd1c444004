"""Memory and processor time of a process and its descendants, as Linux counts them."""

from __future__ import annotations

import contextlib

import psutil


def family_memory_mib(pid: int) -> float:
    """What a process and its descendants would take if they were alone on the machine; 0 if ended.

    Two systems that read the same weights share their pages, and neither would need less without
    the other: so a proportional share (PSS) would tell too little of both. Pages that nobody else
    has count for each process; of each file, the most that any process of the family shares with
    whomever counts once.
    """
    private, shared = 0, dict[str, int]()
    for process in _family(pid):
        # One may end while it is being looked at.
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            for mapped in process.memory_maps(grouped=True):
                private += mapped.private_clean + mapped.private_dirty
                own = mapped.shared_clean + mapped.shared_dirty
                shared[mapped.path] = max(own, shared.get(mapped.path, 0))
    return (private + sum(shared.values())) / 2**20


def family_pss_mib(pid: int) -> float:
    """What a process and its descendants take together: each page once, shared out; 0 if ended."""
    taken = 0
    for process in _family(pid):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            taken += process.memory_full_info().pss
    return taken / 2**20


def family_cpu_seconds(pid: int) -> float:
    """Processor time that a process and its descendants have taken; of those that live."""
    seconds = 0.0
    for process in _family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def machine_cpu_seconds() -> float:
    """Processor time that the machine has spent on anybody, or that was taken from it."""
    times = psutil.cpu_times()
    # A guest's time is in user and nice already.
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def _family(pid: int) -> list[psutil.Process]:
    """A process and its descendants; none if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []
