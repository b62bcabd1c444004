"""`captionserve demo`: export, serve, caption and stop, on the images that come with the project."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from captionserve import CaptionClient, GenerationOptions
from rich.table import Table

from captionserve_server.cli.console import messages, output, stages
from captionserve_server.serving.launch import launched_service


def demo(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder with a checkpoint and images.", exists=True, file_okay=False
        ),
    ] = Path("demo"),
) -> None:
    """Caption the demo images through gateway, Triton, encoder and decoder, and stop again."""
    # Imported here: PyTorch takes seconds to import, and the other commands do without it.
    from captionserve_server.export.logs import quiet_libraries
    from captionserve_server.export.repository import export_checkpoint

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="captionserve-demo-") as repository:
        with stages("exporting the demo checkpoint") as progress:
            export_checkpoint(
                str(folder / "checkpoint"),
                Path(repository),
                progress=lambda stage: progress.update(progress.task_ids[0], description=stage),
            )
        messages.print("starting Triton and the gateway")
        with launched_service(Path(repository)) as service:
            output.print(_captioned(folder / "images", service.grpc))


def _captioned(images: Path, target: str) -> Table:
    table = Table("image", "caption", "score", title="captions by the service")
    with CaptionClient(target) as client:
        for name in json.loads((images / "captions.json").read_text()):
            result = client.caption(images / name, GenerationOptions(num_beams=4))
            table.add_row(name, result.text, f"{result.captions[0].score:.3f}")
    return table
