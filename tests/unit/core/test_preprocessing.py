"""What preprocessing refuses, and how."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from captionserve_server.core.errors import (
    CaptionServeError,
    ImageCorruptError,
    ImageTooManyPixelsError,
    InvalidPixelValuesError,
    UnsupportedImageFormatError,
)
from captionserve_server.core.framing import Framing
from captionserve_server.core.image_files import MAX_PIXELS
from captionserve_server.core.preprocessing import (
    PreprocessorConfig,
    pixels_of_values,
    preprocess,
    read_preprocessor_config,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

CONFIG = PreprocessorConfig()


def png(width: int = 20, height: int = 10) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 50).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


@pytest.mark.parametrize("content", [b"", png()[:40], png()[:-30], b"\xff\xd8\xff\xe0 no more"])
def test_damaged_images_are_corrupt(content: bytes) -> None:
    with pytest.raises(ImageCorruptError):
        preprocess(content, CONFIG)


@pytest.mark.parametrize(
    "content",
    [
        b"plain text",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<!doctype html><title>no image</title>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
        b"%PDF-1.7",
        b"II*\0\x08\0\0\0",
    ],
)
def test_what_is_no_accepted_image_is_unsupported(content: bytes) -> None:
    with pytest.raises(UnsupportedImageFormatError):
        preprocess(content, CONFIG)


@pytest.mark.parametrize(
    ("width", "height"), [(MAX_PIXELS + 1, 1), (9000, 9000), (65535, 65535), (2**31 - 1, 9)]
)
def test_too_many_pixels_are_refused_from_the_header(width: int, height: int) -> None:
    with pytest.raises(ImageTooManyPixelsError):
        preprocess(png_header(width, height), CONFIG)


def test_an_absurd_aspect_that_resizing_would_blow_up_is_refused() -> None:
    config = read_preprocessor_config(
        {"image_processor_type": "DeiTImageProcessor", "size": {"shortest_edge": 256}}
    )
    with pytest.raises(ImageTooManyPixelsError):
        preprocess(png(20000, 1), config)


@given(st.binary(max_size=200), st.integers(0, 60))
def test_any_damage_is_an_image_or_an_error_of_ours(noise: bytes, position: int) -> None:
    content = png()
    damaged = content[:position] + noise + content[position + len(noise) :]
    try:
        pixels = preprocess(damaged, CONFIG).whole
    except CaptionServeError:
        return
    assert pixels.shape == (3, 224, 224)


def test_messages_show_no_exception_text() -> None:
    with pytest.raises(ImageCorruptError) as caught:
        preprocess(png()[:40], CONFIG)
    assert caught.value.message == "the image is damaged or incomplete"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_processor_type": "CLIPImageProcessor"},
        {"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 224}},
        {"image_processor_type": "DeiTImageProcessor", "crop_size": {"shortest_edge": 224}},
    ],
)
def test_processors_that_are_not_supported_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"not supported|height and width"):
        read_preprocessor_config(settings)


# The narrowest deviations that checkpoints in use have, and the widest.
IMAGENET = PreprocessorConfig(
    height=16, width=16, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225)
)
HALVES = PreprocessorConfig(height=16, width=16)
# Every value that a sample of a channel may have.
ALL_PIXELS = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (3, 1, 1))


def values_of(pixels: NDArray[np.uint8], config: PreprocessorConfig) -> NDArray[np.float32]:
    """What the image processor makes of whole pixels [3, height, width]."""
    mean, std = (np.reshape(each, (3, 1, 1)) for each in (config.image_mean, config.image_std))
    values: NDArray[np.float32] = ((pixels * config.rescale_factor - mean) / std).astype(np.float32)
    return values


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to the nearest number of which float32 has the lower 16 bits zero."""
    return ((values.view(np.uint32) + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("config", [IMAGENET, HALVES], ids=["imagenet", "halves"])
def test_pixels_are_found_again_in_any_precision(config: PreprocessorConfig) -> None:
    values = values_of(ALL_PIXELS, config)
    half = values.astype(np.float16).astype(np.float32)
    for given_values in (values, half, bfloat16(values)):
        np.testing.assert_array_equal(pixels_of_values(given_values, config), ALL_PIXELS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    values = values_of(ALL_PIXELS, HALVES)
    values[1, 2, 3] = value
    with pytest.raises(InvalidPixelValuesError, match="must be finite"):
        pixels_of_values(values, HALVES)


@pytest.mark.parametrize("shape", [(3, 16, 15), (3, 32, 32), (1, 16, 16)])
def test_values_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidPixelValuesError, match=r"must have the shape \(3, 16, 16\)"):
        pixels_of_values(np.zeros(shape, np.float32), HALVES)


def test_values_that_no_pixel_has_are_refused() -> None:
    values = values_of(ALL_PIXELS, HALVES)
    # Beyond white; between two pixels; one that bfloat16 can hold, and no processor's.
    wrong = [values + 0.1, values + 0.5 / 127.5, np.full_like(values, 0.25)]
    for each in wrong:
        with pytest.raises(InvalidPixelValuesError, match="not what the checkpoint's"):
            pixels_of_values(each, HALVES)


def test_a_part_too_narrow_to_be_resized_is_refused_as_its_file_is() -> None:
    config = PreprocessorConfig(height=None, width=None, shortest_edge=224, do_center_crop=True)
    image = png(20_000, 224)
    assert preprocess(image, config).whole.shape == (3, 224, 224)
    with pytest.raises(ImageTooManyPixelsError):
        preprocess(image, config, framing=Framing(regions=((0, 0, 20_000, 1),)))
    with pytest.raises(ImageTooManyPixelsError):
        preprocess(png(20_000, 1), CONFIG, framing=Framing(resize="center_crop"))
    assert preprocess(png(20_000, 1), CONFIG, framing=Framing(resize="letterbox")).whole.any()


@pytest.mark.parametrize(
    ("config", "colour"),
    [
        (PreprocessorConfig(), (128, 128, 128)),
        (PreprocessorConfig(image_mean=(0.485, 0.456, 0.406)), (124, 116, 104)),
        (PreprocessorConfig(do_normalize=False), (0, 0, 0)),
        (PreprocessorConfig(do_rescale=False, image_mean=(127.2, 300.0, -4.0)), (127, 255, 0)),
        (PreprocessorConfig(rescale_factor=1 / 127.5, image_mean=(1.0, 1.0, 1.0)), (128, 128, 128)),
    ],
)
def test_what_is_added_is_as_near_to_0_as_whole_pixels_allow(
    config: PreprocessorConfig, colour: tuple[int, int, int]
) -> None:
    assert config.zero_colour() == colour
