"""`captionserve bulk-ray`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from captionserve import Framing, GenerationOptions

from captionserve_server.bulk.captioners import Captioner
from captionserve_server.bulk.journal import Journal
from captionserve_server.bulk.parts import (
    BatchWork,
    ClusterError,
    DeadlyBatchError,
    Parts,
    batches,
)
from captionserve_server.bulk.run import Progress, options_fingerprint
from captionserve_server.bulk.sources import Table, table, tables
from captionserve_server.cli.bulk import given_options, refuse_parts
from captionserve_server.cli.bulk_messages import (
    said_in_a_sentence,
    shown,
    tell_end,
    teller,
    unknown_output,
)
from captionserve_server.cli.captioners import (
    captioners,
    refusals_as_wrong_usage,
    refuse_what_needs_a_service,
)
from captionserve_server.cli.console import ExitCode, messages
from captionserve_server.cli.decoding_options import with_decoding_options
from captionserve_server.cli.framing_options import with_framing_options
from captionserve_server.cli.service_options import (
    DEFAULT_TARGET,
    ServiceOptions,
    with_service_options,
)
from captionserve_server.runtime.cores import available_cores


@with_decoding_options
@with_framing_options
@with_service_options(DEFAULT_TARGET)
def bulk_ray(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Parquet files with a column `path` or `image`: files, folders, globs.",
            metavar="SOURCE...",
        ),
    ],
    *,
    options: GenerationOptions,
    framing: Framing,
    service: ServiceOptions,
    folder: Annotated[
        Path,
        typer.Option("--output", help="Folder for Parquet files of captions.", file_okay=False),
    ],
    local: Annotated[
        Path | None,
        typer.Option(help="Model repository that each actor captions with, instead of a service."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of the Ray cluster, or auto for this machine's. By default that of "
            "RAY_ADDRESS, else a Ray is started here and ended again."
        ),
    ] = None,
    actors: Annotated[int, typer.Option(help="Processes that caption.", min=1)] = 1,
    cores_each: Annotated[
        int | None,
        typer.Option(
            help="Cores of each of them. By default 1 with a service, else all there are, shared.",
            min=1,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            help="Rows that are captioned and written together; what a death may undo.", min=1
        ),
    ] = 256,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed in an earlier run.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what earlier runs have done.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds allowed for each image.", min=0.001)] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Caption tables of images on a Ray cluster, whose nodes all see the same files."""
    refuse_parts(framing)
    if local is not None:
        refuse_what_needs_a_service(context)
    elif cores_each is None:
        cores_each = 1  # It mostly waits.
    wanted = _Wanted(address, actors, cores_each, batch_size, retry_failed, restart)
    make = functools.partial(
        captioners,
        service.in_any_folder(),
        framing,
        None if local is None else local.absolute(),
        timeout,
    )
    given = given_options(options, framing.get("resize"))
    tell, parts = teller(as_json=as_json), Parts(folder.absolute())
    with refusals_as_wrong_usage(), said_in_a_sentence(), _failures_in_a_sentence():
        found = {path: table(path) for path in tables(sources)}
        with shown(sum(each.rows for each in found.values()), as_json=as_json) as told:
            progress = _caption_tables(found, parts, options, given, make, wanted, told)
        failures = Counter(reason for _, reason in parts.failures())
    raise typer.Exit(tell_end(tell, progress, failures))


@dataclass(frozen=True)
class _Wanted:
    """The options of the same names."""

    address: str | None
    actors: int
    cores_each: int | None
    batch_size: int
    retry_failed: bool
    restart: bool


def _caption_tables(
    found: Mapping[Path, Table],
    parts: Parts,
    options: GenerationOptions,
    given: Mapping[str, object],
    make: Callable[..., AbstractContextManager[Sequence[Captioner]]],
    wanted: _Wanted,
    told: Callable[[Progress], None],
) -> Progress:
    """Caption all that is still to be done; what was done.

    Args:
        found: the tables.
        parts: where captions go.
        options: of all captions.
        given: all that was asked for, by name.
        make: makes captioners, for so many cores, in the process that is to use them.
        wanted: the other options.
        told: called when something was done.
    """
    # Ray takes a second to import, and is there only with the extra of its name.
    from captionserve_server.bulk import on_ray

    with on_ray.cluster(wanted.address, _local_cores(wanted)):
        cores = wanted.cores_each or on_ray.cores_of_each(wanted.actors)
        make = functools.partial(make, cores)
        model = on_ray.described_model(make, cores)
        with _opened(parts, restart=wanted.restart) as journal:
            size = {"batch_size": wanted.batch_size}
            # What lies where a table lay must be that table.
            as_found = {str(path): vars(each) for path, each in found.items()}
            journal.hold_to({"model": model, "options": given, "bulk-ray": size, **as_found})
        left = parts.left_of(batches(found, wanted.batch_size), retry_failed=wanted.retry_failed)
        done_before = sum(each.rows for each in found.values()) - sum(map(len, left))
        progress = Progress(seen=done_before, done_before=done_before)
        work = BatchWork(parts, options, options_fingerprint(given, model), wanted.retry_failed)
        with parts.attempted():
            for done in on_ray.caption_batches(
                left, work, make, model, actors=wanted.actors, cores=cores
            ):
                progress.add(done)
                told(progress)
    return progress


def _local_cores(wanted: _Wanted) -> int:
    """Those of a Ray that is started here: what is asked for fits in, whatever the machine has."""
    return max(available_cores(), wanted.actors * (wanted.cores_each or 1))


def _opened(parts: Parts, *, restart: bool) -> Journal:
    """What is known of how the parts were made, which lies beside their folder.

    Raises:
        OutputError: if there are parts of which nothing is known.
    """
    about = Journal.of(parts.folder)
    if restart:
        Journal.remove(about)
        parts.remove()
    elif parts.are_there() and not about.exists():
        raise unknown_output(parts.folder)
    return Journal(about)


@contextmanager
def _failures_in_a_sentence() -> Iterator[None]:
    """Say what Ray or one of its actors failed with."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        messages.print("error: bulk-ray needs pip install 'captionserve-server[ray]'", markup=False)
        raise typer.Exit(ExitCode.NOT_STARTED) from error
    except (ClusterError, DeadlyBatchError) as error:
        messages.print(f"error: {error}; the same command goes on from here", markup=False)
        raise typer.Exit(ExitCode.FAILED) from error
