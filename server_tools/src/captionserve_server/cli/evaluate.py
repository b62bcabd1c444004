"""`captionserve evaluate`: how right the demo checkpoint is on scenes that it never saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from captionserve import CaptionClient, GenerationOptions
from PIL import Image
from rich.progress import track
from rich.table import Table

from captionserve_server.cli.console import messages, output, print_json
from captionserve_server.cli.served import served_with_progress
from captionserve_server.evaluation.held_out import Split, held_out_scenes

if TYPE_CHECKING:
    from captionserve_server.evaluation.metrics import EvaluationReport

# Enough that encoding and decoding batches stay full.
_IN_FLIGHT = 16
_TIMEOUT_SECONDS = 120.0


def evaluate(
    target: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running service; else one is started.")
    ] = None,
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
    with _service(target, checkpoint) as address:
        reports = {split: _report(address, split, scenes, seed, options) for split in splits}
    if as_json:
        print_json({split: dataclasses.asdict(report) for split, report in reports.items()})
    else:
        output.print(_table(reports))


@contextmanager
def _service(target: str | None, checkpoint: Path) -> Iterator[str]:
    if target is not None:
        yield target
        return
    with served_with_progress(str(checkpoint)) as service:
        yield service.grpc


def _report(
    target: str, split: Split, count: int, seed: int, options: GenerationOptions
) -> EvaluationReport:
    # Imported here: the metrics' library is wanted by this command alone.
    from captionserve_server.evaluation.metrics import score_captions

    scenes = list(held_out_scenes(split, count, seed))
    images = [scene.image for scene in scenes]
    return score_captions(scenes, _captions(target, images, options, label=split))


def _captions(
    target: str, images: Sequence[Image.Image], options: GenerationOptions, label: str
) -> list[str]:
    with (
        CaptionClient(target, timeout=_TIMEOUT_SECONDS) as client,
        ThreadPoolExecutor(_IN_FLIGHT) as pool,
    ):
        results = pool.map(lambda image: client.caption(image, options).text, images)
        return list(track(results, label, total=len(images), console=messages, transient=True))


def _table(reports: dict[Split, EvaluationReport]) -> Table:
    table = Table("", *reports, title="demo checkpoint on held-out scenes")
    for field in dataclasses.fields(next(iter(reports.values()))):
        values = [getattr(report, field.name) for report in reports.values()]
        table.add_row(field.name, *(f"{value:.4g}" for value in values))
    return table
