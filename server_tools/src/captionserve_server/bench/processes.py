"""Memory and processor time of a process and its descendants, as Linux counts them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_MIB = 2**20
_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


@dataclass(frozen=True)
class Memory:
    """Memory of a family of processes.

    Attributes:
        mib: what it has now, as if no other process shared its files: pages that several of the
            family share count once.
        peak_rss_mib: the sum of each one's highest so far; shared pages count for each.
    """

    mib: float
    peak_rss_mib: float


@dataclass(frozen=True)
class Mapped:
    """Memory that one process has mapped of one file, or of none.

    Attributes:
        path: the file; a word in brackets where there is none.
        private_bytes: pages that no other process has.
        shared_bytes: pages that others, of the family or not, have as well.
    """

    path: str
    private_bytes: int
    shared_bytes: int


def family_memory(pid: int) -> Memory:
    """The memory of a process and its descendants."""
    mapped: list[Mapped] = []
    peak = 0.0
    for process in _family(pid):
        # One may end while it is being looked at.
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            mapped += _mapped(process)
            peak += _peak_bytes(process.pid)
    return Memory(bytes_alone(mapped) / _MIB, peak / _MIB)


def bytes_alone(mapped: Iterable[Mapped]) -> int:
    """What a family would have if it were alone on the machine.

    Two families that read the same weights share their pages, and neither would need less without
    the other. So of each file the most that any process of the family shares counts once.
    """
    private, shared = 0, dict[str, int]()
    for each in mapped:
        private += each.private_bytes
        shared[each.path] = max(each.shared_bytes, shared.get(each.path, 0))
    return private + sum(shared.values())


def _mapped(process: psutil.Process) -> list[Mapped]:
    return [
        Mapped(
            each.path,
            each.private_clean + each.private_dirty,
            each.shared_clean + each.shared_dirty,
        )
        for each in process.memory_maps(grouped=True)
    ]


def family_cpu_seconds(pid: int) -> float:
    """Processor time that a process and its living descendants have used."""
    seconds = 0.0
    for process in _family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def _family(pid: int) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        yield root
        yield from root.children(recursive=True)


def _peak_bytes(pid: int) -> int:
    found = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0
