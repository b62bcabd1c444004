"""Pictures that a test checkpoint has something to say about."""

from __future__ import annotations

import io

from captionserve_server.evaluation.held_out import held_out_scenes
from PIL import Image

from tests.conftest import DEMO
from tests.reference import picture


def pictures(name: str, count: int) -> list[Image.Image]:
    """Scenes for the demo checkpoint, random pictures for the random ones."""
    if name == DEMO:
        return [scene.image for scene in held_out_scenes("unseen_combinations", count, seed=77)]
    return [picture(seed) for seed in range(count)]


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
