"""The memory that a process may take, by the files that the kernel shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from captionserve_server.runtime.memory import available_memory

from tests.unit.runtime.test_cores import V2_CGROUP, V2_MOUNTS, process_folder, write

MACHINE = 8 * 2**30
V1_CGROUP = "9:memory:/docker/3f\n4:cpu,cpuacct:/docker/3f\n"
V1_MOUNTS = "40 31 0:29 /docker/3f {mount}/memory ro - cgroup cgroup rw,memory\n"


@pytest.fixture(autouse=True)
def eight_gibibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PHYS_PAGES": MACHINE // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)


@pytest.mark.parametrize(
    ("said", "available"), [("max\n", MACHINE), (f"{2**30}\n", 2**30), (f"{2**40}\n", MACHINE)]
)
def test_version_2(said: str, available: int, tmp_path: Path) -> None:
    process = process_folder(tmp_path, V2_CGROUP, V2_MOUNTS)
    write(tmp_path / "groups" / "memory.max", said)
    assert available_memory(process) == available


def test_a_group_above_limits_too(tmp_path: Path) -> None:
    process = process_folder(tmp_path, "0::/a/b\n", V2_MOUNTS)
    write(tmp_path / "groups" / "a" / "b" / "memory.max", f"{2**31}\n")
    write(tmp_path / "groups" / "a" / "memory.max", f"{2**30}\n")
    assert available_memory(process) == 2**30


@pytest.mark.parametrize(
    ("said", "available"), [(f"{2**30}\n", 2**30), ("9223372036854771712\n", MACHINE)]
)
def test_version_1(said: str, available: int, tmp_path: Path) -> None:
    process = process_folder(tmp_path, V1_CGROUP, V1_MOUNTS)
    write(tmp_path / "groups" / "memory" / "memory.limit_in_bytes", said)
    assert available_memory(process) == available


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == MACHINE
