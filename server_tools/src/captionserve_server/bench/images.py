"""The pictures that every row captions: demo scenes as JPEG files of a photo's size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from captionserve_server.demo.scenes import compose_scene, sample_facts
from captionserve_server.demo.splits import TRAINING_STYLES, is_held_out

WIDTH_PIXELS = 640
HEIGHT_PIXELS = 480
_JPEG_QUALITY = 90
_SEED = 2026


def bench_images(count: int) -> list[bytes]:
    """JPEG files of `count` scenes that the demo checkpoint never saw; always the same ones."""
    return [_jpeg(position) for position in range(count)]


def write_images(images: list[bytes], folder: Path) -> None:
    """Write the files under names that sort in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    for position, image in enumerate(images):
        (folder / f"{position:04}.jpg").write_bytes(image)


def _jpeg(position: int) -> bytes:
    rng = np.random.default_rng([_SEED, position])
    style = TRAINING_STYLES[position % len(TRAINING_STYLES)]
    facts = sample_facts(rng, accept=is_held_out)
    scene = compose_scene(facts, style, rng, side_pixels=WIDTH_PIXELS)
    # Squeezed, not cut: the encoder's square of it shows the whole scene again.
    picture = scene.image.resize((WIDTH_PIXELS, HEIGHT_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
