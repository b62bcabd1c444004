"""Memory and processor time of real processes."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from captionserve_server.bench.processes import (
    family_cpu_seconds,
    family_memory_mib,
    machine_cpu_seconds,
)

MIB = 2**20
# Maps a file, touches it all, and says so; with a number, has so many children that do the same.
READER = """
import mmap, os, sys
for _ in range(int(sys.argv[2])):
    if os.fork() == 0:
        break
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(sum(view[::4096]), flush=True)
sys.stdin.read()
"""

BUSY_SECONDS = 0.5
# A parent and a child, each busy for a time that it measures itself; says when both have been.
BUSY = f"""
import os, sys, time
def work():
    while time.process_time() < {BUSY_SECONDS}:
        pass
down, up = os.pipe()
if os.fork() == 0:
    work()
    os.write(up, b"1")
    sys.stdin.read()
    os._exit(0)
work()
os.read(down, 1)
print(flush=True)
sys.stdin.read()
"""


@contextmanager
def reader(path: Path, children: int = 0) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(path), str(children)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        for _ in range(1 + children):
            process.stdout.readline()
        yield process.pid
    finally:
        process.communicate()


def test_what_others_read_as_well_counts_whole_and_within_a_family_once(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * (64 * MIB))
    with reader(path) as alone:
        memory = family_memory_mib(alone)
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            assert sum(view[::4096]) > 0
            beside_us = family_memory_mib(alone)
            view.close()
    with reader(path, children=2) as parent:
        family = family_memory_mib(parent)
    assert 64 <= memory < 96
    assert abs(beside_us - memory) < 16
    assert 64 <= family < 128


def test_a_familys_processor_time_is_all_of_its_processes_and_the_machines_is_more() -> None:
    before = machine_cpu_seconds()
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        family = family_cpu_seconds(process.pid)
        machine = machine_cpu_seconds() - before
        process.communicate()
    # The kernel counts in hundredths of a second.
    assert family >= 2 * BUSY_SECONDS - 0.04
    assert machine >= family - 0.1
    assert family_cpu_seconds(process.pid) == 0


def test_a_process_that_has_ended_has_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert family_memory_mib(child.pid) == 0
