"""What a service holds, and what of it has grown: the measure of every leak test."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from captionserve_server.serving.ready import ReadyReport

from tests.scraped import total

SETTLE_SECONDS = 60.0
# What allocators keep back; a leak of one image's states per ten requests is far more over 2,000.
MEMORY_SLACK_BYTES = 48 * 2**20
# gRPC starts and ends a few threads of its own as it sees fit.
SLACKS = {"slots": 0, "processes": 0, "threads": 6, "open_files": 6, "shared_files": 0}


@dataclass(frozen=True)
class Footprint:
    """What the service holds.

    Attributes:
        slots: decoder slots in use.
        processes: the gateway, Triton and its stubs.
        threads: of all of them.
        open_files: likewise.
        shared_files: files in /dev/shm of this service.
        memory_bytes: private memory of all processes.
    """

    slots: int
    processes: int
    threads: int
    open_files: int
    shared_files: int
    memory_bytes: int


def footprint(service: ReadyReport) -> Footprint:
    gateway = psutil.Process(service.pids["gateway"])
    processes = [gateway, *gateway.children(recursive=True)]
    return Footprint(
        slots=slots_used(service),
        processes=len(processes),
        threads=sum(process.num_threads() for process in processes),
        open_files=sum(process.num_fds() for process in processes),
        shared_files=len(shared_files(processes)),
        memory_bytes=sum(process.memory_full_info().uss for process in processes),
    )


def shared_files(processes: list[psutil.Process]) -> set[Path]:
    """What lies in /dev/shm under the names of these processes' Triton, in use or left behind."""
    mapped = " ".join(each.path for one in processes for each in one.memory_maps())
    prefixes = set(re.findall(r"/dev/shm/(captionserve-triton-.{8})", mapped))
    return {path for prefix in prefixes for path in Path("/dev/shm").glob(f"{prefix}*")}


def slots_used(service: ReadyReport) -> int:
    return int(total(service.triton_metrics, "captionserve_slots_used"))


def leaks(before: Footprint, after: Footprint) -> list[str]:
    """What has grown, in words."""
    found = [
        f"{name}: {getattr(before, name)} to {getattr(after, name)}"
        for name, slack in SLACKS.items()
        if getattr(after, name) > getattr(before, name) + slack
    ]
    if after.memory_bytes > before.memory_bytes + MEMORY_SLACK_BYTES:
        found.append(f"memory: {before.memory_bytes >> 20} to {after.memory_bytes >> 20} MiB")
    return found


def idle(service: ReadyReport) -> Footprint:
    """The footprint once no slot is in use, or after the time to settle.

    Who has given up is still decoded for a moment, and metrics are shown at a pace.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while (now := footprint(service)).slots and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def settled(service: ReadyReport, before: Footprint) -> Footprint:
    """The footprint once it is no larger than before, or after the time to settle."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while leaks(before, after := idle(service)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return after
