"""How much memory this process may take, by the machine and by its control groups."""

from __future__ import annotations

import os
from pathlib import Path

from captionserve_server.runtime.control_groups import PROCESS, groups_of

# What version 1 says where there is no limit is a number that no machine has.
_NO_LIMIT = 2**60


def available_memory(process: Path = PROCESS) -> int:
    """Bytes that this process may take at most: the machine's, or what its groups leave of them.

    Args:
        process: its folder in /proc.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    groups = groups_of(process, "memory")
    limits = [_limit(group.version, folder) for group in groups for folder in group.folders]
    return min([machine, *(limit for limit in limits if limit is not None)])


def _limit(version: int, folder: Path) -> int | None:
    """Bytes that a group allows; None where it sets no limit."""
    name = "memory.max" if version == 2 else "memory.limit_in_bytes"
    try:
        text = (folder / name).read_text().strip()
    except OSError:  # As of processor time, see cores.py.
        return None
    return None if text == "max" or int(text) >= _NO_LIMIT else int(text)
