"""Whether Triton and the processes of its Python models live; Triton itself does not notice.

A process that has ended is seen within one look, one that is stopped within two, and one whose
heart has stopped within HEARTBEAT_SECONDS.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

LOOK_SECONDS = 0.25
# Many times the interval of the beats: on a machine that is overloaded a thread may wait long.
HEARTBEAT_SECONDS = 10.0

_PROC = Path("/proc")
_STUB = "triton_python_backend_stub"
# Which of its arguments names the model's instance (the last one ends the list): decoder_0_0.
_INSTANCE = -3
_INSTANCE_SUFFIX = "_0_0"


class _State(NamedTuple):
    """What /proc says of a process: a letter, and the clock ticks at which it was started."""

    letter: str
    started: str


@dataclass
class _Watched:
    name: str
    started: str
    stopped: bool = False
    beat: int = 0
    beaten: float = 0.0


class ProcessWatch:
    """Looks after one Triton and the processes that it has started."""

    def __init__(self, triton: int, heartbeats: Path) -> None:
        """Look after a process.

        Args:
            triton: its id.
            heartbeats: folder of the files that its models' processes touch.
        """
        self._triton = triton
        self._heartbeats = heartbeats
        self._watched: dict[int, _Watched] = {}
        self._add(triton, "Triton")

    def find_models(self) -> None:
        """Look after what Triton has started meanwhile, too."""
        for tasks in (_PROC / str(self._triton) / "task").glob("*/children"):
            try:
                children = tasks.read_text().split()
            except OSError:  # The thread has ended.
                continue
            for child in map(int, children):
                name = _model_of(child)
                if name is not None and child not in self._watched:
                    self._add(child, name)

    def look(self) -> str | None:
        """What has happened to one of the processes, as a sentence; None while all live."""
        for pid, process in self._watched.items():
            state = _state(pid)
            if state is None or state.started != process.started or state.letter in "ZX":
                return f"{process.name} has ended by itself"
            # Twice in a row: a debugger or a shell may stop a process for a moment.
            if state.letter == "T" and process.stopped:
                return f"{process.name} is stopped"
            process.stopped = state.letter == "T"
            if self._heart_has_stopped(pid, process):
                return f"{process.name} has given no sign of life for {HEARTBEAT_SECONDS:g} seconds"
        return None

    async def failure(self) -> str:
        """Wait until something has happened to one of the processes; what."""
        while (seen := self.look()) is None:
            await asyncio.sleep(LOOK_SECONDS)
        return seen

    def _add(self, pid: int, name: str) -> None:
        state = _state(pid)
        self._watched[pid] = _Watched(name, started="" if state is None else state.started)

    def _heart_has_stopped(self, pid: int, process: _Watched) -> bool:
        try:
            beat = (self._heartbeats / str(pid)).stat().st_mtime_ns
        except FileNotFoundError:  # Its model is still loading, or has no Python of ours.
            return False
        if beat != process.beat:
            process.beat, process.beaten = beat, time.monotonic()
        return time.monotonic() - process.beaten > HEARTBEAT_SECONDS


def _state(pid: int) -> _State | None:
    try:
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Behind the program's name, which may have spaces and brackets of its own.
    fields = stat.rpartition(")")[2].split()
    return _State(fields[0], fields[19])


def _model_of(pid: int) -> str | None:
    """The name of the process of a Python model; None for any other process."""
    try:
        arguments = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # Triton also starts the program without arguments, through a shell, to see whether it is there.
    if not arguments[0].endswith(_STUB) or len(arguments) < -_INSTANCE:
        return None
    return f"the process of {arguments[_INSTANCE].removesuffix(_INSTANCE_SUFFIX)}"
