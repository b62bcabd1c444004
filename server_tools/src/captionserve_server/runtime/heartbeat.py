"""Signs of life: a thread of its own in each of Triton's Python processes touches a file.

A process that is stopped or has ended shows in /proc. One whose interpreter hangs does not: only
that its file grows old. A long run of a graph is no hang, for it lets other threads run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

HEARTBEAT_FOLDER_VARIABLE = "CAPTIONSERVE_HEARTBEAT_FOLDER"
"""Environment variable with the folder of the files; unset where nobody watches."""

BEAT_SECONDS = 0.5


def heartbeat_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where signs of life are wanted, if anywhere.

    Args:
        environment: may have HEARTBEAT_FOLDER_VARIABLE.
    """
    folder = environment.get(HEARTBEAT_FOLDER_VARIABLE)
    return Path(folder) if folder else None


def beat(folder: Path) -> NoReturn:
    """Touch this process's file, which has its id for a name, for ever."""
    path = folder / str(os.getpid())
    while True:
        path.touch()
        time.sleep(BEAT_SECONDS)
