"""`captionserve demo`: export, serve, caption and stop, on the images that come along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from captionserve import CaptionClient, GenerationOptions

from captionserve_server.cli.console import messages, output
from captionserve_server.cli.served import served_with_progress

_OPTIONS = GenerationOptions(num_beams=4)


def demo(
    folder: Annotated[
        Path, typer.Argument(help="Folder with a checkpoint and images, as in the repository.")
    ] = Path("demo"),
) -> None:
    """Caption the demo images through gateway, Triton, encoder and decoder, and stop again."""
    checkpoint, images = folder / "checkpoint", folder / "images"
    captions = images / "captions.json"
    for wanted in (checkpoint / "config.json", captions):
        if not wanted.is_file():
            raise typer.BadParameter(
                f"there is no {wanted}: give the demo folder of captionserve's repository",
                param_hint="folder",
            )
    names: list[str] = list(json.loads(captions.read_text()))
    messages.print(
        f"exports {checkpoint}, serves it, captions {len(names)} images, and stops again",
        markup=False,
    )
    with served_with_progress(str(checkpoint)) as service, CaptionClient(service.grpc) as client:
        messages.print(f"captioning with a service on {service.grpc}, 4 beams", markup=False)
        for name in names:
            result = client.caption(images / name, _OPTIONS)
            score = result.captions[0].score
            output.print(f"{name}: {result.text} (score {score:.4f})", markup=False)
    messages.print("done, and all is stopped; README.md says how to serve your own", markup=False)
