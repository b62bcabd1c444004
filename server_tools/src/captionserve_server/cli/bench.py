"""`captionserve bench`: speed beside other ways to run the same model, in one run."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from captionserve_server.cli.console import ExitCode, messages, output, stages
from captionserve_server.export.precision import Precision

_FULL = "full"
_DEMO = "demo"
_DEMO_FOLDER = Path("demo/checkpoint")
# What the full-size model is made to say, since random weights never end a caption.
_FULL_SIZE_TOKENS = 16
_NUM_BEAMS = (1, 4)
# Characters that the tables need, also where output goes to a file.
_LEAST_WIDTH = 140


def bench(
    checkpoint: Annotated[
        str,
        typer.Option(
            help="demo; full for random weights of nlpconnect's shapes; a local folder or hub id."
        ),
    ] = _DEMO,
    rounds: Annotated[int, typer.Option(help="How often every row runs.", min=1)] = 5,
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Beginning of the rows to run, as a shell pattern; may be repeated."),
    ] = None,
    num_beams: Annotated[
        list[int] | None, typer.Option(help="Beams; may be repeated. By default 1 and 4.", min=1)
    ] = None,
    images: Annotated[
        int, typer.Option(help="Images of a run at least; never fewer than twice its load.", min=1)
    ] = 16,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of every caption; 0 for natural lengths. By default 16 with full, else 0.",
            min=0,
        ),
    ] = None,
    repository: Annotated[
        list[str] | None,
        typer.Option(
            help="PRECISION=DIR of an exported model repository; may be repeated. Only these are "
            "served then, unless --precision says what to export beside them."
        ),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(help="What to export and serve; may be repeated. By default all."),
    ] = None,
    encode_batch: Annotated[
        int, typer.Option(help="Images that the bare graphs encode at once.", min=1)
    ] = 4,
    reference: Annotated[
        str, typer.Option(help="Row that the others are compared with, without its beams.")
    ] = "transformers, batch 1",
    work_folder: Annotated[
        Path, typer.Option(help="Kept for the next time: full-size weights, optimum.")
    ] = Path("build/bench"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write every value to.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="PNG file to draw.")] = None,
) -> None:
    """Compare captionserve with transformers, optimum, a naive Triton model and bare graphs."""
    # Imported here: only who exports and measures needs PyTorch.
    from captionserve_server.bench.benchmark import (
        Comparison,
        NothingToMeasureError,
        compare,
        full_size_checkpoint,
    )
    from captionserve_server.bench.chart import write_chart
    from captionserve_server.bench.report import Settings
    from captionserve_server.export.logs import quiet_libraries

    quiet_libraries()
    work_folder.mkdir(parents=True, exist_ok=True)
    if tokens is None:
        tokens = _FULL_SIZE_TOKENS if checkpoint == _FULL else 0
    settings = Settings(
        command=shown_command(sys.argv[1:]),
        checkpoint=Path(checkpoint).name,
        rounds=rounds,
        images=images,
        forced_tokens=tokens or None,
        reference=reference,
    )
    with _ending_on_sigterm(), stages("preparing") as progress:
        places = {_DEMO: str(_DEMO_FOLDER)}
        if checkpoint == _FULL:
            places[_FULL] = str(full_size_checkpoint(work_folder))
        comparison = Comparison(
            checkpoint=places.get(checkpoint, checkpoint),
            repositories=_repositories(repository or []),
            precisions=precision or ([] if repository else list(Precision)),
            num_beams=num_beams or _NUM_BEAMS,
            patterns=rows or ["*"],
            encode_batch=encode_batch,
            work_folder=work_folder,
        )
        try:
            report = compare(comparison, settings, progress)
        except NothingToMeasureError as error:
            raise typer.BadParameter(str(error), param_hint="--rows") from error
    output.width = max(output.width, _LEAST_WIDTH)
    output.print(report.as_tables())
    if json_file is not None:
        json_file.write_text(report.as_json())
    if chart is not None and report.measurements.samples:
        write_chart(report, chart)
    if report.measurements.failures:
        messages.print("error: some systems were not measured to the end")
        raise typer.Exit(ExitCode.FAILED)


def _repositories(given: Sequence[str]) -> dict[str, Path]:
    """What --repository says, by precision."""
    repositories: dict[str, Path] = {}
    for text in given:
        precision, separator, folder = text.partition("=")
        if not separator or not Path(folder).is_dir():
            raise typer.BadParameter(f"{text!r} is not PRECISION=DIR", param_hint="--repository")
        repositories[precision] = Path(folder)
    return repositories


def shown_command(arguments: Sequence[str]) -> str:
    """The command line for others to read: of folders of this machine only the last name."""
    return shlex.join(["captionserve", *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    name, separator, value = argument.rpartition("=")
    return f"{name}{separator}{Path(value).name}" if Path(value).is_absolute() else argument


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does, so that every system that was started is ended."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
