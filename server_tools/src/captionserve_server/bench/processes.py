"""Memory of a process and its descendants, as Linux counts it."""

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
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    private, shared = 0, dict[str, int]()
    for process in family:
        # One may end while it is being looked at.
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            for mapped in process.memory_maps(grouped=True):
                private += mapped.private_clean + mapped.private_dirty
                own = mapped.shared_clean + mapped.shared_dirty
                shared[mapped.path] = max(own, shared.get(mapped.path, 0))
    return (private + sum(shared.values())) / 2**20
