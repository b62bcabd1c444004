"""Memory and processor time of a process and its descendants, as Linux counts them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_MIB = 2**20
_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


@dataclass(frozen=True)
class Memory:
    """Memory of a family of processes.

    Attributes:
        pss_mib: what is theirs now; pages that several share are parted among them.
        peak_rss_mib: the sum of each one's highest so far; shared pages count for each.
    """

    pss_mib: float
    peak_rss_mib: float


def family_memory(pid: int) -> Memory:
    """The memory of a process and its descendants."""
    pss, peak = 0.0, 0.0
    for process in _family(pid):
        # One may end while it is being looked at.
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            pss += process.memory_full_info().pss
            peak += _peak_bytes(process.pid)
    return Memory(pss / _MIB, peak / _MIB)


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
