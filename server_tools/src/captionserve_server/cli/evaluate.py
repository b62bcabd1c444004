"""`captionserve evaluate`: how right the demo checkpoint is on scenes that it never saw."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from captionserve import GenerationOptions
from rich.table import Table

from captionserve_server.cli.captioning import asked_service, caption_all
from captionserve_server.cli.console import output, print_json
from captionserve_server.cli.service_options import ServiceOptions, with_service_options
from captionserve_server.evaluation.held_out import Split, held_out_scenes

if TYPE_CHECKING:
    from captionserve_server.evaluation.metrics import EvaluationReport


@with_service_options(None)
def evaluate(
    *,
    service: ServiceOptions,
    checkpoint: Annotated[
        Path, typer.Option(help="Checkpoint to serve when no target is given.")
    ] = Path("demo/checkpoint"),
    scenes: Annotated[int, typer.Option(help="Held-out scenes of each split.", min=1)] = 500,
    num_beams: Annotated[int, typer.Option(help="Beams of the beam search.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Caption held-out demo scenes through the whole stack and score the captions."""
    options = GenerationOptions(num_beams=num_beams)
    splits: tuple[Split, ...] = get_args(Split)
    with asked_service(service, checkpoint) as asked:
        reports = {split: _report(asked, split, scenes, seed, options) for split in splits}
    if as_json:
        print_json({split: dataclasses.asdict(report) for split, report in reports.items()})
    else:
        output.print(_table(reports))


def _report(
    service: ServiceOptions, split: Split, count: int, seed: int, options: GenerationOptions
) -> EvaluationReport:
    # Imported here: the metrics' library is wanted by the commands that judge captions alone.
    from captionserve_server.evaluation.metrics import score_captions

    scenes = list(held_out_scenes(split, count, seed))
    images = [scene.image for scene in scenes]
    results = caption_all(service, images, options, label=split)
    return score_captions(scenes, [result.text for result in results])


def _table(reports: dict[Split, EvaluationReport]) -> Table:
    table = Table("", *reports, title="demo checkpoint on held-out scenes")
    for field in dataclasses.fields(next(iter(reports.values()))):
        values = [getattr(report, field.name) for report in reports.values()]
        table.add_row(field.name, *(f"{value:.4g}" for value in values))
    return table
