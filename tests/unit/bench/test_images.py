"""The pictures of the benchmark."""

from __future__ import annotations

import io

from captionserve_server.bench.images import bench_images
from PIL import Image


def test_pictures_are_the_same_photos_each_time() -> None:
    images = bench_images(3)
    assert images == bench_images(3)
    assert len(set(images)) == 3
    for image in images:
        with Image.open(io.BytesIO(image)) as picture:
            assert (picture.format, picture.size) == ("JPEG", (640, 480))
