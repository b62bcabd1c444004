"""A copy of a model repository that is Triton's alone, under names that Triton can use.

Triton starts the processes of its Python models through a shell without quoting, and Python writes
its bytecode beside each model.py. So Triton is never given the repository itself, which may have
any name and be read-only, but a folder whose name is plain.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

# What a shell takes as it is.
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")
_USUAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_COPIED_SUFFIXES = {".pbtxt", ".py"}


class NoPlainFolderError(OSError):
    """There is no temporary folder with a plain name to write to; the message says what to do."""


def make_plain_folder(prefix: str) -> Path:
    """Make a temporary folder whose path a shell takes as it is.

    It lies where temporary files belong (TMPDIR), or in a usual place if that has another name.

    Args:
        prefix: what the folder's name begins with.

    Raises:
        NoPlainFolderError: if none of these places can be written to.
    """
    for parent in (tempfile.gettempdir(), *_USUAL_FOLDERS):
        if not _PLAIN.fullmatch(parent):
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
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
