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
_REFERENCES = ("transformers, batch 1", "transformers, batch 8")
# Characters that the tables need, also where output goes to a file.
_LEAST_WIDTH = 220


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
    reference: Annotated[
        list[str] | None,
        typer.Option(
            help="Beginning of a row that the others are compared with; may be repeated. By "
            "default transformers in batches of 1 and 8."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write every value to.")
    ] = None,
    chart: Annotated[Path | None, typer.Option(help="PNG file to draw.")] = None,
) -> None:
    """Compare captionserve with transformers, optimum, a naive Triton model and the edge mode."""
    # Imported here: only who exports and measures needs PyTorch.
    from captionserve_server.bench.benchmark import (
        NothingToMeasureError,
        compare,
        full_size_checkpoint,
    )
    from captionserve_server.bench.chart import write_chart
    from captionserve_server.bench.report import Comparison
    from captionserve_server.export.logs import quiet_libraries

    quiet_libraries()
    if tokens is None:
        tokens = _FULL_SIZE_TOKENS if checkpoint == _FULL else 0
    with _ending_on_sigterm(), stages("preparing") as progress:
        places = {_DEMO: str(_DEMO_FOLDER)}
        if checkpoint == _FULL:
            places[_FULL] = str(full_size_checkpoint())
        comparison = Comparison(
            command=shown_command(sys.argv[1:]),
            name=Path(checkpoint).name,
            checkpoint=places.get(checkpoint, checkpoint),
            repositories=_repositories(repository or []),
            precisions=precision or ([] if repository else list(Precision)),
            patterns=rows or ["*"],
            references=reference or _REFERENCES,
            num_beams=num_beams or _NUM_BEAMS,
            rounds=rounds,
            images=images,
            forced_tokens=tokens or None,
        )
        try:
            report = compare(comparison, progress)
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
    shown = []
    for argument in arguments:
        name, separator, value = argument.rpartition("=")
        absolute = Path(value).is_absolute()
        shown.append(f"{name}{separator}{Path(value).name}" if absolute else argument)
    return shlex.join(["captionserve", *shown])


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
