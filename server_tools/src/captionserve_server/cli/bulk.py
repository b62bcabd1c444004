"""`captionserve caption` for many: what its flags mean, and what a person sees while it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from captionserve import GenerationOptions
from rich import progress as bars
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from captionserve_server.bulk.captioners import Captioner, DifferentModelsError, common_model
from captionserve_server.bulk.journal import DifferentRunError, Journal
from captionserve_server.bulk.outputs import OutputError, sidecar_of, write_sidecar, writer_for
from captionserve_server.bulk.rows import Row
from captionserve_server.bulk.run import Progress, Run, options_fingerprint, still_to_do
from captionserve_server.bulk.sources import Item, SourceError, check, count, items
from captionserve_server.cli.console import ExitCode, messages
from captionserve_server.cli.parameters import with_parameters
from captionserve_server.core.framing import Resize


@dataclasses.dataclass(frozen=True)
class BulkOptions:
    """What is done with many images.

    Attributes:
        output: the table to write, if any.
        sidecar: whether each caption is written beside its image.
        overwrite: whether sidecars that are there are written anew.
        only_missing: whether rows of a table that have a caption are left alone.
        retry_failed: whether what failed in an earlier run is tried again.
        restart: whether what earlier runs have done is forgotten.
        limit: how many images to caption at most.
        dry_run: only count.
        alt_text_chars: how long the alt texts of sidecars and of further columns may be; None where
            sidecars have the captions.
    """

    output: Path | None
    sidecar: bool
    overwrite: bool
    only_missing: bool
    retry_failed: bool
    restart: bool
    limit: int | None
    dry_run: bool
    alt_text_chars: int | None = None

    @property
    def about_sidecars(self) -> dict[str, dict[str, object]]:
        """What all runs into the same output must have in common for its sidecars to be alike."""
        return {"sidecar": {"alt_text_chars": self.alt_text_chars}} if self.sidecar else {}

    def is_there(self, item: Item) -> bool:
        """Whether an item's caption is all there, where no journal knows."""
        return self.output is None and self._has_sidecar(item)

    def keep(self, item: Item, row: Row) -> None:
        """Write an item's sidecar, if there is to be one."""
        if self.sidecar and item.path is not None and not (row.failed or self._has_sidecar(item)):
            alt_text = None if self.alt_text_chars is None else row.alt_text(self.alt_text_chars)
            write_sidecar(item.path, str(alt_text or row.caption))

    def _has_sidecar(self, item: Item) -> bool:
        """Whether there is a sidecar that stays."""
        if item.path is None or self.overwrite or not self.sidecar:
            return False
        return sidecar_of(item.path).exists()


def with_bulk_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command the options for many images; it gets them all as `bulk`."""
    parameters = [
        _parameter(
            "output", Path | None, None, "Table to write, of all images: .jsonl, .csv or .parquet."
        ),
        _parameter(
            "sidecar", str | None, None, "Write each caption or alt text beside its image: txt."
        ),
        _parameter("overwrite", bool, False, "Write sidecars anew that are there."),
        _parameter("only_missing", bool, False, "Leave rows alone that have a caption."),
        _parameter("retry_failed", bool, False, "Try again what failed in an earlier run."),
        _parameter("restart", bool, False, "Forget what earlier runs have done."),
        _parameter("limit", int | None, None, "Caption so many at most.", min=1),
        _parameter("dry_run", bool, False, "Only say what there is to do."),
    ]
    return with_parameters(command, "bulk", parameters, _bulk_options)


def _parameter(name: str, kind: Any, default: object, help: str, **more: Any) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    option = typer.Option(flag, help=help, rich_help_panel="Many images", **more)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _bulk_options(*, sidecar: str | None, **values: Any) -> BulkOptions | None:
    """What was asked for; None where it is nothing for many images."""
    if sidecar not in (None, "txt"):
        raise typer.BadParameter("must be txt", param_hint="--sidecar")
    wanted = BulkOptions(sidecar=sidecar is not None, **values)
    if wanted.output is not None or wanted.sidecar:
        return wanted
    for name, value in values.items():
        if value:
            flag = "--" + name.replace("_", "-")
            raise typer.BadParameter("goes with --output or --sidecar", param_hint=flag)
    return None


def caption_many(
    sources: Sequence[str],
    captioners: Sequence[Captioner],
    options: GenerationOptions,
    wanted: BulkOptions,
    *,
    resize: Resize | None,
    as_json: bool,
) -> ExitCode:
    """Caption everything that is still to be done; what the process shall end with.

    Args:
        sources: where the images come from.
        captioners: who captions them.
        options: of all captions.
        wanted: what is done with them.
        resize: how the captioners resize them; None for the checkpoint's way.
        as_json: whether events are printed as JSON lines, instead of a progress bar.
    """
    tell = _tell_script if as_json else _tell_person
    given = {name: value for name, value in vars(options).items() if value is not None}
    if resize not in (None, "checkpoint"):
        # Another way of resizing is another caption; the checkpoint's way, said or not, is one.
        given["resize"] = resize
    with _said_in_a_sentence():
        check(sources)
        write = None if wanted.output is None else writer_for(wanted.output, wanted.alt_text_chars)
        model, progress = common_model(captioners), Progress()
        with _opened(wanted) as journal:
            journal.hold_to({"model": model, "options": given, **wanted.about_sidecars})
            todo = still_to_do(
                items(sources),
                journal,
                progress,
                retry_failed=wanted.retry_failed,
                only_missing=wanted.only_missing,
                is_there=wanted.is_there,
                limit=wanted.limit,
            )
            if wanted.dry_run:
                to_do = sum(1 for _ in todo)
                tell("dry_run", seen=progress.seen, done=progress.done_before, to_do=to_do)
                return ExitCode.OK
            with _shown(count(sources), as_json=as_json) as told:
                fingerprint = options_fingerprint(given, model)
                Run(
                    journal,
                    captioners,
                    options,
                    fingerprint,
                    progress=progress,
                    kept=wanted.keep,
                    told=told,
                ).caption(todo)
            if write is not None:
                write(journal.rows())
            failures = journal.failures()
    tell(
        "done",
        captioned=progress.captioned,
        duplicates=progress.duplicates,
        done_before=progress.done_before,
        failed=dict(failures),
    )
    return ExitCode.SOME_FAILED if failures else ExitCode.OK


def _opened(wanted: BulkOptions) -> Journal:
    """The journal to go on with.

    Raises:
        OutputError: if there is an output that it says nothing of.
    """
    if wanted.output is None:
        return Journal(None)
    path = Journal.of(wanted.output)
    if wanted.restart:
        if wanted.dry_run:
            return Journal(None)
        Journal.remove(path)
    elif wanted.output.exists() and not path.exists():
        raise OutputError(
            f"{wanted.output.name} is there, but nothing that says how it was made: "
            "name another output, or say --restart to replace it"
        )
    return Journal(None if wanted.dry_run and not path.exists() else path)


@contextmanager
def _shown(total: int | None, *, as_json: bool) -> Iterator[Callable[[Progress], None]]:
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
def _said_in_a_sentence() -> Iterator[None]:
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
