"""`captionserve caption` for many: what its flags mean."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from captionserve import Framing, GenerationOptions

from captionserve_server.bulk.captioners import Captioner, common_model
from captionserve_server.bulk.journal import Journal
from captionserve_server.bulk.outputs import sidecar_of, write_sidecar, writer_for
from captionserve_server.bulk.rows import Row
from captionserve_server.bulk.run import Progress, Run, options_fingerprint, still_to_do
from captionserve_server.bulk.sources import Item, check, count, items
from captionserve_server.cli.bulk_messages import (
    said_in_a_sentence,
    shown,
    tell_end,
    teller,
    unknown_output,
)
from captionserve_server.cli.console import ExitCode
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
    tell = teller(as_json=as_json)
    given = given_options(options, resize)
    with said_in_a_sentence():
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
            with shown(count(sources), as_json=as_json) as told:
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
    return tell_end(tell, progress, failures)


def given_options(options: GenerationOptions, resize: Resize | None) -> dict[str, object]:
    """What was asked for, by name: where that differs, captions do."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    if resize not in (None, "checkpoint"):
        # The checkpoint's way, said or not, is one.
        given["resize"] = resize
    return given


def refuse_parts(framing: Framing) -> None:
    """Refuse regions and tiles, for which a row has no column."""
    if "regions" in framing or "tiles" in framing:
        raise typer.BadParameter("--region and --tiles are for single images")


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
        raise unknown_output(wanted.output)
    return Journal(None if wanted.dry_run and not path.exists() else path)
