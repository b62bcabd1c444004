"""Memory and processor time of a family of processes."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from captionserve_server.bench.processes import (
    Mapped,
    bytes_alone,
    family_cpu_seconds,
    family_memory,
)

MIB = 2**20
# Maps a file, touches it all, and says so.
READER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(sum(view[::4096]), flush=True)
sys.stdin.read()
"""


def test_what_a_family_shares_counts_once_and_what_it_has_alone_for_each() -> None:
    first = [Mapped("weights", 0, 900), Mapped("[heap]", 50, 0), Mapped("library", 10, 200)]
    second = [Mapped("weights", 0, 700), Mapped("[heap]", 70, 0)]
    assert bytes_alone([*first, *second]) == 900 + 50 + 10 + 200 + 70


def test_others_who_read_the_same_file_make_nobody_smaller(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"x" * (64 * MIB))
    child = subprocess.Popen(
        [sys.executable, "-c", READER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        alone = family_memory(child.pid)
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            assert sum(view[::4096]) > 0
            beside_us = family_memory(child.pid)
            view.close()
    finally:
        child.communicate()
    assert 64 <= alone.mib <= alone.peak_rss_mib
    assert abs(beside_us.mib - alone.mib) < 16


def test_processor_time_is_that_of_descendants_too() -> None:
    # Uses so much processor time and says so; the kernel counts it in hundredths.
    burner = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = family_cpu_seconds(os.getpid())
    child = subprocess.Popen(
        [sys.executable, "-c", burner], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert family_cpu_seconds(os.getpid()) - before >= 0.2
    finally:
        child.communicate(b"\n")


def test_a_process_that_has_ended_has_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert family_cpu_seconds(child.pid) == 0
    assert family_memory(child.pid).mib == 0
