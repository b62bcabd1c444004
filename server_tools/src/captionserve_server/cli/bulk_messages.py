"""What a person or a script is told while many images are captioned, and at the end."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import typer
from rich import progress as bars
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from captionserve_server.bulk.captioners import DifferentModelsError
from captionserve_server.bulk.journal import DifferentRunError
from captionserve_server.bulk.outputs import OutputError
from captionserve_server.bulk.run import Progress
from captionserve_server.bulk.sources import SourceError
from captionserve_server.cli.console import ExitCode, messages


class Tell(Protocol):
    """Tells of an event."""

    def __call__(self, event: str, **values: object) -> None:
        """Say what it was, and what is known of it."""


def teller(*, as_json: bool) -> Tell:
    """Who tells of events: JSON lines for a script, else sentences for a person."""
    return _tell_script if as_json else _tell_person


def tell_end(tell: Tell, progress: Progress, failures: Counter[str]) -> ExitCode:
    """Tell how a run has ended; what the process shall end with.

    Args:
        tell: tells it.
        progress: of the run.
        failures: how many rows of the output have which reason.
    """
    tell(
        "done",
        captioned=progress.captioned,
        duplicates=progress.duplicates,
        done_before=progress.done_before,
        failed=dict(failures),
    )
    return ExitCode.SOME_FAILED if failures else ExitCode.OK


def unknown_output(output: Path) -> OutputError:
    """The refusal of an output that nothing is known of."""
    return OutputError(
        f"{output.name} is there, but nothing that says how it was made: "
        "name another output, or say --restart to replace it"
    )


@contextmanager
def shown(total: int | None, *, as_json: bool) -> Iterator[Callable[[Progress], None]]:
    """Show how far the run has come: a bar for a person, lines for a script."""
    if as_json:
        yield lambda done: _tell_script(
            "progress",
            total=total,
            seen=done.seen,
            captioned=done.captioned,
            failed=dict(done.failed),
        )
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )
    with bars.Progress(*columns, console=messages, transient=True) as bar:
        task = bar.add_task("", total=total, rate="", failed="")

        def show(done: Progress) -> None:
            failed = sum(done.failed.values())
            completed = done.done_before + done.captioned + failed
            elapsed = bar.tasks[task].elapsed or 0.0
            rate = (done.captioned + failed) / elapsed if elapsed else 0.0
            reasons = ", ".join(f"{count} {name}" for name, count in done.failed.most_common(3))
            bar.update(task, completed=completed, rate=f"{rate:.1f} images/s", failed=reasons)

        yield show


def _tell_script(event: str, **values: object) -> None:
    """A JSON line on standard output."""
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


def _tell_person(event: str, **values: object) -> None:
    """A sentence on standard error."""
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    messages.print(f"{event.replace('_', ' ')}: {said}", markup=False)


@contextmanager
def said_in_a_sentence() -> Iterator[None]:
    """Say what stands in the way, and how to go on."""
    try:
        yield
    except (SourceError, OutputError) as error:
        raise typer.BadParameter(str(error)) from error
    except DifferentModelsError as error:
        raise typer.BadParameter(str(error), param_hint="--target") from error
    except DifferentRunError as error:
        raise typer.BadParameter(
            f"earlier captions of this output were made otherwise ({error}): name another output, "
            "or say --restart to begin anew"
        ) from error
    except sqlite3.Error as error:
        messages.print(f"error: what is done cannot be kept: {error}", markup=False)
        raise typer.Exit(ExitCode.FAILED) from error
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            messages.print("interrupted; the same command goes on from here", markup=False)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
