"""Talking to the person or script at the other end: output, progress and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Results go to standard output, everything about the work to standard error. Captions and names of
# files are printed as they are, even where they read like :dog:.
output = Console(highlight=False, soft_wrap=True, emoji=False)
messages = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


class ExitCode(IntEnum):
    """What the command's exit status says. 2 is the command line parser's own, for wrong usage."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNSUPPORTED = 3
    # Of many images: each of the others is captioned.
    SOME_FAILED = 3
    NOT_STARTED = 4
    CALL_FAILED = 5
    # As a shell says it of who was interrupted.
    INTERRUPTED = 130


def print_json(value: object) -> None:
    """Print one JSON document for a script."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@contextmanager
def stages(first: str) -> Iterator[Callable[[str], None]]:
    """Say which stage has begun; call what is yielded with the next one.

    A person at a terminal sees a spinner and the time, others a line for each.
    """
    if not messages.is_terminal:
        _say_stage(first)
        yield _say_stage
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True) as progress:
        task = progress.add_task(first, total=None)
        yield lambda stage: progress.update(task, description=stage)


def _say_stage(stage: str) -> None:
    messages.print(f"{stage} ...", markup=False)
