"""`captionserve bench`: speed beside other ways to run the same model, in one run."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from captionserve_server.cli.console import ExitCode, messages, output, stages
from captionserve_server.export.precision import Precision

_NUM_BEAMS = (1, 4)
_REFERENCES = ("transformers, batch 1", "transformers, batch 8")
# Characters that the tables need, also where output goes to a file.
_LEAST_WIDTH = 220
_DOTS_PER_INCH = 110


def bench(
    checkpoint: Annotated[
        str, typer.Option(help="A local folder or a hub id.")
    ] = "demo/checkpoint",
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
        typer.Option(help="Tokens of every caption. By default they end by themselves.", min=1),
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
    from captionserve_server.bench.benchmark import NothingToMeasureError, compare
    from captionserve_server.bench.chart import draw_chart
    from captionserve_server.bench.report import Comparison
    from captionserve_server.export.logs import quiet_libraries

    quiet_libraries()
    # As Ctrl-C: every system that was started is ended, and what was measured is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    to_export = precision or ([] if repository else list(Precision))
    comparison = Comparison(
        command=shlex.join(["captionserve", *sys.argv[1:]]),
        checkpoint=checkpoint,
        repositories={**_repositories(repository or []), **dict.fromkeys(to_export)},
        patterns=rows or ["*"],
        references=reference or _REFERENCES,
        num_beams=num_beams or _NUM_BEAMS,
        rounds=rounds,
        images=images,
        forced_tokens=tokens,
    )
    with stages("preparing") as progress:
        try:
            report = compare(comparison, progress)
        except NothingToMeasureError as error:
            raise typer.BadParameter(str(error), param_hint="--rows") from error
    output.width = max(output.width, _LEAST_WIDTH)
    output.print(report.as_tables())
    if json_file is not None:
        json_file.write_text(report.as_json())
    if chart is not None and report.rounds:
        draw_chart(report).savefig(chart, format="png", dpi=_DOTS_PER_INCH)
    if report.failures:
        messages.print("error: some systems were not measured to the end")
        raise typer.Exit(ExitCode.FAILED)


def _repositories(given: Sequence[str]) -> dict[Precision, Path]:
    """What --repository says, by precision."""
    repositories: dict[Precision, Path] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if name not in list(Precision) or not Path(folder).is_dir():
            raise typer.BadParameter(f"{text!r} is not PRECISION=DIR", param_hint="--repository")
        repositories[Precision(name)] = Path(folder)
    return repositories
