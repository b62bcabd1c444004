"""What Triton and its models print: the last lines are remembered, all are kept where wanted."""

from __future__ import annotations

import collections
import logging
import logging.handlers
import os
import threading
from pathlib import Path

_log = logging.getLogger("captionserve_server.triton_log")

# Triton's own writing: E0923 10:11:12.123456 ...; what has another beginning is a model's.
_SEVERE = ("E", "F")
# What every Triton says that finds no GPU.
_NO_GPU = ("CudaDriverHelper", "NVML")
# How the lines of its tables begin, which it prints at every start.
_TABLE = ("+-", "| ")
_REMEMBERED_LINES = 200
_TAIL_LINES = 15
_MOST_CHARACTERS = 2000
_FILE_BYTES = 16 * 2**20
_OLD_FILES = 3


class TritonLog:
    """Takes the lines of one Triton after the other.

    Errors go to the service's own log as well, which may be all that is kept.
    """

    def __init__(self, path: Path | None) -> None:
        """Keep everything in a file, which is rotated; None keeps the last lines in memory.

        Raises:
            OSError: if the file cannot be written.
        """
        self._lines: collections.deque[str] = collections.deque(maxlen=_REMEMBERED_LINES)
        self._file: logging.Handler | None = None
        if path is not None:
            self._file = logging.handlers.RotatingFileHandler(
                path, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8"
            )

    def pipe(self) -> int:
        """A new descriptor to print to; what is printed is taken until nobody holds it any more."""
        self._lines.clear()
        reading, writing = os.pipe()
        threading.Thread(target=self._take, args=(reading,), name="triton-log", daemon=True).start()
        return writing

    def tail(self) -> str:
        """The last errors of the present Triton; its last lines, if there are none."""
        lines = [line for line in self._lines if line and not line.startswith(_TABLE)]
        errors = list(filter(_is_severe, lines)) or lines
        return "\n".join(errors[-_TAIL_LINES:])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _take(self, descriptor: int) -> None:
        # A line that cannot be kept must not end the reading: Triton would stand still.
        with open(descriptor, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                text = line.rstrip("\n")[:_MOST_CHARACTERS]
                self._lines.append(text)
                if _is_severe(text):
                    _log.warning("%s", text)
                if self._file is not None:
                    # A handler writes its own troubles, such as a full disk, to standard error.
                    self._file.handle(logging.makeLogRecord({"msg": text}))


def _is_severe(line: str) -> bool:
    return line.startswith(_SEVERE) and not any(word in line for word in _NO_GPU)
