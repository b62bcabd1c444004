"""What the edge mode takes: images and options mean what they mean to the service."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captionserve._images import encode_image, image_message
from captionserve_server.core.errors import ImageTooManyPixelsError
from captionserve_server.core.preprocessing import PreprocessorConfig, preprocess
from captionserve_server.local.images import image_views
from PIL import Image

from tests.pictures import grey_png
from tests.reference import picture

CONFIG = PreprocessorConfig(height=24, width=20)
AS_IT_IS = PreprocessorConfig(do_resize=False)
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I"]


def in_mode(mode: str) -> Image.Image:
    image = picture(seed=3)
    if mode == "I":
        return image.convert("L").convert("I").point(lambda value: value * 257)
    if mode in {"LA", "PA", "RGBA", "RGBa"}:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    if mode in {"PA", "RGBa"}:
        return image.convert("LA").convert(mode) if mode == "PA" else image.convert(mode)
    return image.convert(mode)


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "given",
    [
        lambda path, content: path,
        lambda path, content: str(path),
        lambda path, content: content,
        lambda path, content: bytearray(content),
        lambda path, content: memoryview(content),
        lambda path, content: io.BytesIO(content),
        lambda path, content: Image.open(io.BytesIO(content)),
        lambda path, content: np.asarray(Image.open(io.BytesIO(content))),
    ],
    ids=["path", "str", "bytes", "bytearray", "memoryview", "file", "picture", "array"],
)
def test_an_image_is_what_the_client_takes(
    given: Callable[[Path, bytes], Any], tmp_path: Path
) -> None:
    content = as_png(picture(seed=1))
    path = tmp_path / "image.png"
    path.write_bytes(content)
    np.testing.assert_array_equal(
        image_views(given(path, content), CONFIG).whole, preprocess(content, CONFIG).whole
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_is_seen_as_the_service_sees_it(mode: str) -> None:
    image = in_mode(mode)
    sent = preprocess(encode_image(image), CONFIG).whole
    np.testing.assert_array_equal(image_views(image, CONFIG).whole, sent)


def test_a_picture_with_a_transparent_colour_is_seen_as_the_service_sees_it() -> None:
    image = picture(seed=3).convert("P")
    image.info["transparency"] = image.getpixel((0, 0))
    opaque = image_views(picture(seed=3).convert("P"), CONFIG).whole
    seen = image_views(image, CONFIG).whole
    np.testing.assert_array_equal(seen, preprocess(encode_image(image), CONFIG).whole)
    assert (seen != opaque).any()


def test_a_picture_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture(seed=4).save(file, "PNG", exif=exif)
    turned = image_views(Image.open(file), CONFIG).whole
    np.testing.assert_array_equal(turned, preprocess(file.getvalue(), CONFIG).whole)
    assert (turned != image_views(picture(seed=4), CONFIG).whole).any()


@pytest.mark.parametrize("depth", [2, 4, 16])
def test_a_colour_key_of_a_picture_not_yet_read_is_the_files(depth: int) -> None:
    content = grey_png(
        depth, b"\0" + bytes(8) + b"\0" + b"\x11" * 8, 64 // depth, 2, 0x1111 % 2**depth
    )
    image = Image.open(io.BytesIO(content))
    seen = image_views(image, AS_IT_IS).whole
    assert (seen[:, 0] == 0).all()
    assert (seen == 255).any()
    np.testing.assert_array_equal(seen, preprocess(content, AS_IT_IS).whole)
    np.testing.assert_array_equal(seen, preprocess(encode_image(image), AS_IT_IS).whole)


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        None,
        io.StringIO("text"),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        Image.new("F", (4, 4)),
        Image.new("RGB", (0, 4)),
        Path("there is no such file"),
    ],
    ids=["number", "none", "text", "2-d", "floats", "empty", "mode", "no pixels", "missing"],
)
def test_what_is_no_image_is_refused_as_the_client_refuses_it(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError, OSError)) as client:
        image_message(wrong)
    with pytest.raises(type(client.value)) as local:
        image_views(wrong, CONFIG)
    assert str(local.value) == str(client.value)


def test_pictures_in_memory_have_the_files_limit() -> None:
    with pytest.raises(ImageTooManyPixelsError):
        image_views(Image.new("1", (10_000, 5_001)), CONFIG)
