"""`captionserve demo`: export, serve, caption and stop, on the images that come along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from captionserve import CaptionClient, GenerationOptions

from captionserve_server.cli.console import output
from captionserve_server.cli.served import served_with_progress


def demo(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder with a checkpoint and images.", exists=True, file_okay=False),
    ] = Path("demo"),
) -> None:
    """Caption the demo images through gateway, Triton, encoder and decoder, and stop again."""
    with served_with_progress(str(folder / "checkpoint")) as service:
        _caption_images(folder / "images", service.grpc)


def _caption_images(images: Path, target: str) -> None:
    with CaptionClient(target) as client:
        for name in json.loads((images / "captions.json").read_text()):
            result = client.caption(images / name, GenerationOptions(num_beams=4))
            score = result.captions[0].score
            output.print(f"{name}: {result.text} (score {score:.4f})", markup=False)
