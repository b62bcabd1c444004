"""The cores that a process may use, by the files that the kernel shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from captionserve_server.runtime.control_groups import ControlGroup, control_groups
from captionserve_server.runtime.cores import (
    THREADS_VARIABLE,
    available_cores,
    default_threads,
    parse_cfs_quota,
    parse_cpu_max,
    threads_of_graphs,
    whole_cores,
)

# A container of Docker with version 2 sees its own group as the top.
V2_CGROUP = "0::/\n"
V2_MOUNTS = "31 23 0:28 / {mount} ro,nosuid - cgroup2 cgroup rw\n"
# One with version 1, where the group is mounted under the name that it has outside.
V1_CGROUP = "12:pids:/docker/3f\n4:cpu,cpuacct:/docker/3f\n3:cpuset:/docker/3f\n0::/\n"
V1_MOUNTS = (
    "40 31 0:29 /docker/3f {mount}/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:30 /docker/3f {mount}/cpuset ro - cgroup cgroup rw,cpuset\n"
    "42 31 0:31 / {mount}/tmp rw,relatime - tmpfs tmpfs rw,mode=755\n"
)


def process_folder(folder: Path, cgroup: str, mountinfo: str) -> Path:
    """A folder like /proc/self, and one that stands for /sys/fs/cgroup in `folder`/groups."""
    process = folder / "process"
    process.mkdir()
    (process / "cgroup").write_text(cgroup)
    (process / "mountinfo").write_text(mountinfo.format(mount=folder / "groups"))
    return process


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)


@pytest.mark.parametrize(
    ("text", "limit"),
    [("max 100000\n", None), ("150000 100000\n", 1.5), ("400000 100000", 4.0), ("5000 50000", 0.1)],
)
def test_cpu_max(text: str, limit: float | None) -> None:
    assert parse_cpu_max(text) == limit


@pytest.mark.parametrize(("quota", "limit"), [("-1\n", None), ("150000\n", 1.5), ("25000\n", 0.25)])
def test_cfs_quota(quota: str, limit: float | None) -> None:
    assert parse_cfs_quota(quota, "100000\n") == limit


@pytest.mark.parametrize(
    ("affinity", "quotas", "whole"),
    [
        (8, [], 8),
        (8, [1.5], 1),
        (8, [2.0], 2),
        (8, [6.9, 3.1], 3),
        (2, [16.0], 2),
        (8, [0.1], 1),
    ],
)
def test_only_whole_cores_count_and_at_least_one(
    affinity: int, quotas: list[float], whole: int
) -> None:
    assert whole_cores(affinity, quotas) == whole


def test_groups_of_version_2() -> None:
    assert control_groups(
        "0::/system.slice/us.service\n", V2_MOUNTS.format(mount="/sys/c"), "cpu"
    ) == [ControlGroup(2, Path("/sys/c/system.slice/us.service"), Path("/sys/c"))]


def test_groups_of_version_1_lie_below_what_is_mounted() -> None:
    mount = Path("/sys/c/cpu,cpuacct")
    assert control_groups(V1_CGROUP, V1_MOUNTS.format(mount="/sys/c"), "cpu") == [
        ControlGroup(1, mount, mount)
    ]


def test_groups_of_both_versions_side_by_side() -> None:
    mounts = V1_MOUNTS + V2_MOUNTS.replace("{mount}", "{mount}/unified")
    found = control_groups(V1_CGROUP, mounts.format(mount="/sys/c"), "cpu")
    assert [group.version for group in found] == [1, 2]


@pytest.mark.parametrize("path", ["/../../other", "/elsewhere"])
def test_a_group_that_is_not_to_be_seen_is_taken_for_the_topmost(path: str) -> None:
    (group,) = control_groups(
        f"0::{path}\n", "31 23 0:28 /mine /sys/c ro - cgroup2 cgroup rw\n", "cpu"
    )
    assert group.folder == Path("/sys/c")


@pytest.mark.usefixtures("eight_cores")
def test_the_least_limit_on_the_way_up_holds(tmp_path: Path) -> None:
    process = process_folder(tmp_path, "0::/pod/container\n", V2_MOUNTS)
    write(tmp_path / "groups" / "pod" / "container" / "cpu.max", "max 100000\n")
    assert available_cores(process) == 8
    write(tmp_path / "groups" / "pod" / "cpu.max", "350000 100000\n")
    assert available_cores(process) == 3
    # Above what is mounted is no group of ours.
    write(tmp_path / "cpu.max", "100000 100000\n")
    assert available_cores(process) == 3


@pytest.mark.usefixtures("eight_cores")
def test_a_quota_of_version_1_holds(tmp_path: Path) -> None:
    process = process_folder(tmp_path, V1_CGROUP, V1_MOUNTS)
    write(tmp_path / "groups" / "cpu,cpuacct" / "cpu.cfs_quota_us", "250000\n")
    write(tmp_path / "groups" / "cpu,cpuacct" / "cpu.cfs_period_us", "100000\n")
    assert available_cores(process) == 2


@pytest.mark.usefixtures("eight_cores")
def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert available_cores(tmp_path / "no such folder") == 8


def test_threads_are_left_to_the_runtime_on_a_whole_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_folder(tmp_path, V2_CGROUP, V2_MOUNTS)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert default_threads(process) == 0
    write(tmp_path / "groups" / "cpu.max", "600000 100000\n")
    assert default_threads(process) == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    assert default_threads(process) == 2


def test_this_process_has_cores() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


def test_the_environment_may_say_how_many_threads() -> None:
    assert threads_of_graphs({THREADS_VARIABLE: "3"}) == 3
    assert threads_of_graphs({THREADS_VARIABLE: "0"}) == default_threads()
    assert threads_of_graphs({}) == default_threads()
