"""What glibc's malloc does with memory that is free again: that it goes back to the system.

By itself its threshold for that rises to the largest block that was ever freed, so that each
thread keeps as much as the largest picture or request it ever had. Other C libraries have no such
settings.
"""

from __future__ import annotations

import contextlib
import ctypes

# A picture is taken by Pillow in blocks of 16 MiB.
_PICTURE_BLOCK = 16 << 20
TRITON_TUNABLES = ":".join(
    (
        # Transparent huge pages: a lone step, which reads all weights for a few rows, takes 7 %
        # less in int8. Older versions ignore it.
        "glibc.malloc.hugetlb=1",
        f"glibc.malloc.mmap_threshold={_PICTURE_BLOCK - (1 << 20)}",
        f"glibc.malloc.trim_threshold={_PICTURE_BLOCK}",
    )
)
"""GLIBC_TUNABLES for Triton and the models' processes."""

# In the gateway nothing is as large as a request, of which few are larger than this.
_REQUEST_BLOCK = 1 << 20
# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def give_requests_back() -> None:
    """Have this process, from now on, give back what large requests took, once they have ended."""
    with contextlib.suppress(AttributeError):  # musl's has no mallopt.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _REQUEST_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _REQUEST_BLOCK)
