"""Memory goes back to the system once requests have ended."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Blocks as of requests, of which one is freed first, and then what keeps the heap from shrinking.
_PROGRAM = """
import psutil, sys
from captionserve_server.serving.malloc import give_requests_back
if sys.argv[1] == "with":
    give_requests_back()
block = 4 << 20
first = bytes(block)
del first
rest = psutil.Process().memory_info().rss
blocks = [b"x" * (block + number) for number in range(16)]
pins = [bytes(4096) for _ in range(1000)]
del blocks
print((psutil.Process().memory_info().rss - rest) / block)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is a setting of glibc")
def test_what_large_requests_took_is_given_back() -> None:
    kept = {
        how: float(subprocess.check_output([sys.executable, "-c", _PROGRAM, how], text=True))
        for how in ("with", "without")
    }
    assert kept["with"] < 3
    assert kept["without"] > 8, "glibc gives it back by itself by now; then nothing need be set"
