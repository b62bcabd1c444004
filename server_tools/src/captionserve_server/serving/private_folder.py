"""The folder that a service's Tritons serve from, under names that Triton can use.

    repository/     a copy of the model repository
    backends/       the backends, with the stub of this Python
    heartbeats/     a file for each process of a Python model

Triton starts the processes of its Python models through a shell without quoting, and Python writes
its bytecode beside each model.py. So Triton is never given the repository itself, which may have
any name and be read-only, but a folder whose name is plain.

A service that is killed leaves its folder and what Triton keeps in /dev/shm, where both may outlive
a container. So each service holds a lock while it lives, and the next one removes what belongs to a
lock that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from captionserve_server.runtime.model_repository import versions_of
from captionserve_server.serving.installation import TritonInstallation, assemble_backends

# What a shell takes as it is.
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")
_USUAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_COPIED_SUFFIXES = {".pbtxt", ".py"}

_PREFIX = "captionserve-triton-"
_SHARED_MEMORY = Path("/dev/shm")
_LOCK_SUFFIX = ".lock"


class NoPlainFolderError(OSError):
    """There is no temporary folder with a plain name to write to; the message says what to do."""


class PrivateFolder:
    """The folder of one service.

    Attributes:
        repository: the copy of the model repository.
        backends: the backend folder.
        heartbeats: the folder for signs of life.
    """

    def __init__(self, installation: TritonInstallation, repository: Path) -> None:
        """Make the folder and fill it, and remove what killed services have left.

        Args:
            installation: where the backends come from.
            repository: the model repository; it is only read.

        Raises:
            NoPlainFolderError: if there is no place for it.
        """
        _remove_orphans()
        self._folder = make_plain_folder()
        self.repository = self._folder / "repository"
        self.backends = self._folder / "backends"
        self.heartbeats = self._folder / "heartbeats"
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._lock = _hold(_lock_of(self._folder))
            undo.callback(self.close)
            self.backends.mkdir()
            self.heartbeats.mkdir()
            assemble_backends(installation, self.backends)
            copy_repository(repository, self.repository)
            undo.pop_all()

    @property
    def versions(self) -> list[int]:
        """The versions in the copy, the oldest first."""
        return versions_of(self.repository)

    @property
    def shared_memory_prefix(self) -> str:
        """How the names begin of all that Triton keeps in /dev/shm for this service."""
        return self._folder.name

    def tidy(self) -> None:
        """Remove what a Triton that has ended has left in /dev/shm and here."""
        _remove_shared_memory(self._folder.name)
        for beat in self.heartbeats.iterdir():
            beat.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove everything."""
        _remove_shared_memory(self._folder.name)
        shutil.rmtree(self._folder, ignore_errors=True)
        _lock_of(self._folder).unlink(missing_ok=True)
        os.close(self._lock)


def _lock_of(folder: Path) -> Path:
    """The lock lies where what it guards may be left: a temporary folder may be gone sooner."""
    return _SHARED_MEMORY / f"{folder.name}{_LOCK_SUFFIX}"


def _hold(lock: Path) -> int:
    """Lock a file, which is made; the descriptor that holds it. OSError if another holds it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_orphans() -> None:
    """Remove what services have left that were killed; who still lives holds its lock."""
    for lock in _SHARED_MEMORY.glob(f"{_PREFIX}*{_LOCK_SUFFIX}"):
        try:
            held = _hold(lock)
        except OSError:
            continue
        name = lock.name.removesuffix(_LOCK_SUFFIX)
        _remove_shared_memory(name)
        for parent in {tempfile.gettempdir(), *_USUAL_FOLDERS}:
            shutil.rmtree(Path(parent, name), ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(held)


def _remove_shared_memory(prefix: str) -> None:
    for region in _SHARED_MEMORY.glob(f"{prefix}*"):
        if region.suffix != _LOCK_SUFFIX:
            region.unlink(missing_ok=True)


def make_plain_folder() -> Path:
    """Make a temporary folder whose path a shell takes as it is.

    It lies where temporary files belong (TMPDIR), or in a usual place if that has another name.

    Raises:
        NoPlainFolderError: if none of these places can be written to.
    """
    for parent in (tempfile.gettempdir(), *_USUAL_FOLDERS):
        if not _PLAIN.fullmatch(parent):
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError:
            continue
    raise NoPlainFolderError(
        "Triton needs a temporary folder whose path has letters of ASCII, digits and ._-/ only: "
        f"set TMPDIR to one, or make {_USUAL_FOLDERS[0]} writable"
    )


def copy_repository(repository: Path, folder: Path) -> None:
    """Copy a model repository; what is large is linked, so that it takes no room.

    Hidden folders, such as those of an export that is under way, are left out.

    Args:
        repository: what to copy; it is only read.
        folder: the copy, which does not exist yet.
    """

    def unwanted(parent: str, names: list[str]) -> set[str]:
        return {name for name in names if name.startswith(".") or name == "__pycache__"}

    # Absolute: a link is read from where it lies.
    shutil.copytree(repository.absolute(), folder, ignore=unwanted, copy_function=_copy_or_link)


def _copy_or_link(source: str, target: str) -> None:
    if Path(source).suffix in _COPIED_SUFFIXES:
        shutil.copyfile(source, target)
    else:
        # A hard link would need the same file system and the right to write to the repository's.
        Path(target).symlink_to(source)
