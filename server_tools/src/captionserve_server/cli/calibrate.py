"""`captionserve calibrate`: confidences fitted to demo scenes, and measured on others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.progress import track
from rich.table import Table

from captionserve_server.cli.captioners import local_captioner
from captionserve_server.cli.console import ExitCode, messages, output, print_json, stages
from captionserve_server.evaluation.calibration import (
    CalibrationReport,
    CannotCalibrateError,
    FitReport,
    JudgedCaption,
    Reliability,
    ReliabilityBin,
)
from captionserve_server.evaluation.calibration import calibrate as fit_and_measure
from captionserve_server.evaluation.held_out import Split
from captionserve_server.serving.temporary import exported_checkpoint


def calibrate(
    *,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint to calibrate.")] = Path(
        "demo/checkpoint"
    ),
    fit_scenes: Annotated[
        int, typer.Option(help="Held-out scenes of each split to fit to.", min=1)
    ] = 4000,
    scenes: Annotated[
        int, typer.Option(help="Held-out scenes of each split to measure on.", min=1)
    ] = 1000,
    num_beams: Annotated[int, typer.Option(help="Beams of the beam search.", min=1)] = 4,
    seed: Annotated[
        int, typer.Option(help="Seed of the scenes to fit to; the next one's are measured on.")
    ] = 1,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="confidence.json to write.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fit confidences in captions and words to held-out demo scenes, and measure them on others."""
    fitting, measuring = _judged_captions(
        checkpoint, {seed: fit_scenes, seed + 1: scenes}, num_beams
    )
    try:
        report = fit_and_measure([one for some in fitting.values() for one in some], measuring)
    except CannotCalibrateError as error:
        messages.print(f"error: {error}", markup=False)
        raise typer.Exit(ExitCode.FAILED) from error
    if output_file is not None:
        output_file.write_text(report.calibration.to_json(), encoding="utf-8")
    if as_json:
        fits = {name: dataclasses.asdict(fit) for name, fit in report.fits.items()}
        print_json({"calibration": report.calibration.as_values(), "fits": fits})
    else:
        _print(report)


def _judged_captions(
    checkpoint: Path, counts: Mapping[int, int], num_beams: int
) -> list[dict[str, list[JudgedCaption]]]:
    """For each seed each split's captions: one is nearly always right, the other mostly wrong.

    Args:
        checkpoint: what captions them, in this process.
        counts: seed of scenes to how many of each split there are.
        num_beams: of the beam search.
    """
    # Imported here: the metrics' library is wanted by the commands that judge captions alone.
    from captionserve_server.evaluation.judging import judged_scenes

    splits: tuple[Split, ...] = get_args(Split)
    with ExitStack() as stack:
        with stages("importing PyTorch") as progress:
            folder = stack.enter_context(exported_checkpoint(str(checkpoint), progress))
        captioner = stack.enter_context(local_captioner(folder))

        def judged(split: Split, count: int, seed: int) -> list[JudgedCaption]:
            scenes = judged_scenes(captioner, split, count, seed, num_beams)
            label = f"{split}, seed {seed}"
            tracked = track(scenes, label, total=count, console=messages, transient=True)
            return [scene.judged for scene in tracked]

        return [
            {split: judged(split, count, seed) for split in splits}
            for seed, count in counts.items()
        ]


def _print(report: CalibrationReport) -> None:
    for name, values in report.calibration.as_values().items():
        if name in report.fits:
            output.print(name.replace("_", " "), values)
    for name, fit in report.fits.items():
        title = name.replace("_", " ")
        output.print(_figures_table(title, fit))
        output.print(_signals_table(title, fit))
        output.print(_bins_table(f"{title}, uncalibrated", fit.uncalibrated.bins))
        output.print(_bins_table(f"{title}, calibrated", fit.calibrated.bins))


def _figures_table(title: str, fit: FitReport) -> Table:
    columns = {"uncalibrated": fit.uncalibrated, "calibrated": fit.calibrated, **fit.by_kind}
    names = [name.replace("_", " ") for name in columns]
    table = Table("", *names, title=f"{title}, on scenes that the fit did not see")
    for field in dataclasses.fields(Reliability):
        if field.name != "bins":
            values = [getattr(column, field.name) for column in columns.values()]
            table.add_row(field.name.replace("_", " "), *map(_as_text, values))
    return table


def _signals_table(title: str, fit: FitReport) -> Table:
    kinds = [kind.replace("_", " ") for kind in fit.signals]
    table = Table("AUC of each signal alone", *kinds, title=title)
    for signal in next(iter(fit.signals.values())):
        table.add_row(
            signal.replace("_", " "), *(_as_text(own[signal]) for own in fit.signals.values())
        )
    return table


def _bins_table(title: str, bins: Sequence[ReliabilityBin]) -> Table:
    table = Table("confidence", "how many", "mean confidence", "right", title=title)
    for one in bins:
        values = (one.count, one.mean_confidence, one.right)
        table.add_row(f"{one.lower:.1f} to {one.upper:.1f}", *map(_as_text, values))
    return table


def _as_text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
