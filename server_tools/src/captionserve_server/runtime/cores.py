"""How many cores this process may use, by its affinity and its control groups.

A container is often given a share of a large machine's time. Libraries that count the machine's
cores then start far more threads than can run: the kernel stops all of them when the share of a
period is used up, and whoever waits for the slowest waits until the next period.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from captionserve_server.runtime.control_groups import PROCESS, groups_of

THREADS_VARIABLE = "CAPTIONSERVE_THREADS"
"""Environment variable with the threads that a model takes whose configuration says 0."""


def available_cores(process: Path = PROCESS) -> int:
    """Cores that this process may keep busy; at least 1.

    Args:
        process: its folder in /proc.
    """
    return whole_cores(len(os.sched_getaffinity(0)), _quotas(process))


def default_threads(process: Path = PROCESS) -> int:
    """Threads for one run of a graph, where nobody has said how many.

    Args:
        process: this process's folder in /proc.

    Returns:
        0 where the whole machine is ours: then a runtime knows best, as it tells cores from
        hyperthreads and keeps threads on their cores.
    """
    cores = available_cores(process)
    return cores if cores < (os.cpu_count() or 1) else 0


def threads_of_graphs(environment: Mapping[str, str] = os.environ) -> int:
    """Threads for one run of a graph whose configuration says 0: the environment's, or the default.

    Args:
        environment: may have THREADS_VARIABLE.
    """
    return int(environment.get(THREADS_VARIABLE, "0")) or default_threads()


def whole_cores(affinity: int, quotas: list[float]) -> int:
    """The whole cores in the least of the limits; at least 1.

    A share of 1.5 cores is 1: two threads would use the period's time up within three quarters of
    it and stand still for the rest. What is over goes to the processes around the graphs.

    Args:
        affinity: cores that the process may run on.
        quotas: processor time in each second, in seconds, that its groups may use.
    """
    return max(1, int(min([float(affinity), *quotas])))


def parse_cpu_max(text: str) -> float | None:
    """The cores that a cpu.max file of version 2 allows; None where it sets no limit.

    Args:
        text: such as "150000 100000" or "max 100000".
    """
    quota, period = text.split()
    return None if quota == "max" else int(quota) / int(period)


def parse_cfs_quota(quota_us: str, period_us: str) -> float | None:
    """The cores that the two files of version 1 allow; None where they set no limit.

    Args:
        quota_us: what cpu.cfs_quota_us says; -1 is no limit.
        period_us: what cpu.cfs_period_us says.
    """
    return None if int(quota_us) <= 0 else int(quota_us) / int(period_us)


def _quotas(process: Path) -> list[float]:
    """The limits of all groups of a process; none where the system has no control groups."""
    groups = groups_of(process, "cpu")
    limits = [_limit(group.version, folder) for group in groups for folder in group.folders]
    return [limit for limit in limits if limit is not None]


def _limit(version: int, folder: Path) -> float | None:
    try:
        if version == 2:
            return parse_cpu_max((folder / "cpu.max").read_text())
        return parse_cfs_quota(
            (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
        )
    except OSError:
        # The topmost group has no such file, nor has one without the controller.
        return None
