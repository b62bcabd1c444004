"""The control groups of a process, which limit what it may use of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")
"""This process's folder."""


@dataclass(frozen=True)
class ControlGroup:
    """A control group that may limit what a process uses.

    Attributes:
        version: of control groups, 1 or 2.
        folder: the group's folder.
        mount: the folder of the topmost group that is visible.
    """

    version: int
    folder: Path
    mount: Path

    @property
    def folders(self) -> Iterator[Path]:
        """The group's folder and those above it: each of them limits."""
        yield self.folder
        yield from (above for above in self.folder.parents if above.is_relative_to(self.mount))


def groups_of(process: Path, controller: str) -> list[ControlGroup]:
    """The groups of a process; none where the system has no control groups.

    Args:
        process: its folder in /proc.
        controller: what they limit, such as "cpu" or "memory".
    """
    try:
        cgroup, mountinfo = (process / "cgroup").read_text(), (process / "mountinfo").read_text()
    except OSError:
        return []
    return control_groups(cgroup, mountinfo, controller)


def control_groups(cgroup: str, mountinfo: str, controller: str) -> list[ControlGroup]:
    """The groups that may limit a process.

    Args:
        cgroup: what /proc/self/cgroup says.
        mountinfo: what /proc/self/mountinfo says.
        controller: what they limit, such as "cpu" or "memory".
    """
    paths = dict(_paths_by_version(cgroup, controller))
    groups = []
    for line in mountinfo.splitlines():
        place, _, kind = line.partition(" - ")
        version = _version_of(kind, controller)
        if version in paths:
            root, mount = place.split()[3:5]
            folder = Path(mount) / _below(paths[version], root)
            groups.append(ControlGroup(version, folder, Path(mount)))
    return groups


def _paths_by_version(cgroup: str, controller: str) -> Iterator[tuple[int, str]]:
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _version_of(kind: str, controller: str) -> int:
    """1 or 2 for a mount of groups with this controller; 0 for any other."""
    filesystem, *_, options = kind.split()
    if filesystem == "cgroup2":
        return 2
    return int(filesystem == "cgroup" and controller in options.split(","))


def _below(path: str, root: str) -> PurePosixPath:
    """Where a group lies below what is mounted, which in a container is often the group itself."""
    group = PurePosixPath(path)
    if not group.is_relative_to(root) or ".." in group.parts:
        return PurePosixPath()
    return group.relative_to(root)
