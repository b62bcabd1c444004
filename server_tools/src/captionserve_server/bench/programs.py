"""Other people's programs and packages, used beside ours without being installed among them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

_ERROR_CHARACTERS = 2000


class ProgramError(RuntimeError):
    """A program is not there or does not do what is wanted of it; the message says why."""


def run_program(*command: str | Path) -> None:
    """Run a program to its end.

    Raises:
        ProgramError: with the end of what it printed, if it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        printed = (done.stdout + done.stderr)[-_ERROR_CHARACTERS:]
        raise ProgramError(f"{Path(command[0]).name} failed\n{printed.strip()}")


def packages_in(folder: Path, *requirements: str) -> Path:
    """The absolute folder with these packages and none that they depend on; filled once.

    Raises:
        ProgramError: if pip cannot install them.
    """
    made_of, wanted = folder / "made-of", "\n".join([sys.version, *requirements])
    if not made_of.exists() or made_of.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        target = ("--quiet", "--no-deps", "--target", folder)
        run_program(sys.executable, "-m", "pip", "install", *target, *requirements)
        made_of.write_text(wanted)
    return folder.resolve()
