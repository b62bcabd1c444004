"""The pictures that every system captions: demo scenes as JPEG files of a photo's size."""

from __future__ import annotations

import io

from captionserve_server.evaluation.held_out import held_out_scenes

_SIZE = (640, 480)


def bench_images(count: int) -> list[bytes]:
    """JPEG files of `count` scenes that the demo checkpoint never saw; always the same ones."""
    images = []
    for scene in held_out_scenes("unseen_combinations", count, seed=1):
        buffer = io.BytesIO()
        # Squeezed, not cut: the encoder's square of it shows the whole scene again.
        scene.image.resize(_SIZE).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images
