"""Requests to the `captioner` model, as perf_analyzer's input data."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice

from PIL import Image

from captionserve_server.evaluation.held_out import held_out_scenes
from captionserve_server.triton import wire

# As many as the captioner accepts at once: perf_analyzer takes them in turn, so that no two alike
# are ever in flight, which would be computed once.
REQUESTS = 512
_DISTINCT_IMAGES = 64
_JPEG_QUALITY = 90


def scene_images(count: int = _DISTINCT_IMAGES) -> Iterator[bytes]:
    """JPEG files of the demo's held-out scenes, 224 to 640 pixels a side; the same each time."""
    for scene in held_out_scenes("unseen_combinations", count, seed=1):
        yield _jpeg(scene.image)


def input_data(
    images: Sequence[bytes], options: Mapping[str, int], requests: int = REQUESTS
) -> dict[str, object]:
    """perf_analyzer's input data; write it as JSON.

    Args:
        images: encoded image files, taken in turn.
        options: option tensors to send with each, by the option's name.
        requests: how many to write; each has a NONCE of its own.

    Raises:
        KeyError: if there is no such option.
    """
    settings = {wire.OPTION_TENSORS[name].name: [value] for name, value in options.items()}
    encoded = [_string_element(image) for image in images]
    return {
        "data": [
            {wire.IMAGE.name: {"b64": image}, **settings, wire.NONCE.name: [nonce]}
            for nonce, image in enumerate(islice(cycle(encoded), requests))
        ]
    }


def _string_element(content: bytes) -> str:
    # perf_analyzer sends decoded base64 as it is; Triton's strings begin with their length.
    return base64.b64encode(len(content).to_bytes(4, "little") + content).decode()


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()
