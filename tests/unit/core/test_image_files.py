"""What a file is, that its metadata are not its pixels, and that what is transparent is white."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from captionserve_server.core.errors import ImageCorruptError, UnsupportedImageFormatError
from captionserve_server.core.preprocessing import (
    PreprocessorConfig,
    preprocess,
    preprocess_picture,
)
from numpy.typing import NDArray
from PIL import Image

from tests.reference import picture

AS_IT_IS = PreprocessorConfig(do_resize=False)
PNG_START = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey_png(depth: int, rows: bytes, width: int, height: int, key: int) -> bytes:
    """A grey PNG with a colour key; each row begins with its filter byte, 0."""
    return (
        PNG_START
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(">H", key))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def file_of(image: Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def with_png_chunk(encoded: bytes, added: bytes, *, after_pixels: bool) -> bytes:
    place = encoded.rindex(b"IEND") - 4 if after_pixels else 33
    return encoded[:place] + added + encoded[place:]


def pixels_of(encoded: bytes) -> NDArray[np.uint8]:
    return preprocess(encoded, AS_IT_IS)


@pytest.mark.parametrize(
    "content",
    [
        b"RIFF\x2c\0\0\0WAVEfmt ",
        b"RIFF\x2c\0\0\0AVI LIST",
        b"BMW builds cars, and has done so for a long time",
        b"BM",
        b"P5 is a processor of two hundred megahertz",
        b"P6: the sixth point",
        b"P6\n",
        b"Pf\n2 2\n-1.0\n" + bytes(16),
        b"PF\n2 2\n-1.0\n" + bytes(48),
        b"P7\nWIDTH 2\n",
    ],
)
def test_what_only_begins_like_an_image_is_unsupported(content: bytes) -> None:
    with pytest.raises(UnsupportedImageFormatError):
        pixels_of(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_part_of_an_image_is_corrupt(kind: str, share: float) -> None:
    encoded = file_of(picture(3), kind)
    with pytest.raises(ImageCorruptError):
        pixels_of(encoded[: int(len(encoded) * share)])


@pytest.mark.parametrize(
    "added",
    [
        chunk(b"zTXt", b"Workflow\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))),
        chunk(b"iCCP", b"profile\0\0no zlib"),
        chunk(b"eXIf", b"garbage"),
        chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff"),
        chunk(b"pHYs", b""),
        chunk(b"gAMA", b""),
        chunk(b"tIME", b"1")[:-1] + b"?",
        chunk(b"acTL", b""),
    ],
    ids=lambda added: added[4:8].decode(),
)
@pytest.mark.parametrize("after_pixels", [False, True])
def test_metadata_of_a_png_fail_no_image(added: bytes, after_pixels: bool) -> None:
    encoded = file_of(picture(4), "PNG")
    changed = with_png_chunk(encoded, added, after_pixels=after_pixels)
    np.testing.assert_array_equal(pixels_of(changed), pixels_of(encoded))


@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize(
    "payload", [b"", b"JFIF", b"Adobe", b"Exif\0\0garbage", b"MPF\0II*\0", b"Photoshop 3.0\x008BIM"]
)
def test_metadata_of_a_jpeg_fail_no_image(marker: int, payload: bytes) -> None:
    encoded = file_of(picture(4), "JPEG")
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload
    changed = encoded[:2] + segment + encoded[2:]
    np.testing.assert_array_equal(pixels_of(changed), pixels_of(encoded))


def test_comments_of_a_gif_fail_no_image() -> None:
    encoded = file_of(picture(4), "GIF")
    place = 13 + (3 << (encoded[10] & 7) + 1)
    comment = b"!\xfe" + (b"\xff" + bytes(255)) * 40_000 + b"\0"
    changed = encoded[:place] + comment + encoded[place:]
    np.testing.assert_array_equal(pixels_of(changed), pixels_of(encoded))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_kept(kind: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = file_of(picture(5), kind, exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    np.testing.assert_array_equal(pixels_of(encoded), np.moveaxis(np.asarray(turned), -1, 0))


def test_a_tag_that_cannot_be_written_back_does_not_matter() -> None:
    # Orientation 6, and a resolution that is said to be a fraction of 0xffff bytes far away.
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 12, 9, 26)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)
    good = Image.Exif()
    good[0x0112] = 6
    seen = pixels_of(file_of(picture(5), "JPEG", exif=exif))
    np.testing.assert_array_equal(seen, pixels_of(file_of(picture(5), "JPEG", exif=good)))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_grey_colour_key_is_white(depth: int) -> None:
    key, width = 1 % 2**depth, 32
    # The upper row is black, the lower one of the key.
    sample = key.to_bytes(max(1, depth // 8), "big")
    if depth < 8:
        sample = bytes([sum(key << shift for shift in range(0, 8, depth))])
    length = width * depth // 8
    lower = sample * (length // len(sample))
    encoded = grey_png(depth, b"\0" + bytes(length) + b"\0" + lower, width, 2, key)
    seen = pixels_of(encoded)
    assert (seen[:, 0] == 0).all()
    assert (seen[:, 1] == 255).all()


def test_a_colour_key_of_16_bits_is_one_colour() -> None:
    key = (0x1234, 0x5678, 0x9ABC)
    near = (0x1234, 0x5678, 0x9ABD)
    row = b"\0" + struct.pack(">6H", *key, *near)
    encoded = (
        PNG_START
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(">3H", *key))
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    seen = pixels_of(encoded)[:, 0].T.tolist()
    assert seen == [[255, 255, 255], [0x12, 0x56, 0x9A]]


def rgba() -> Image.Image:
    image = Image.new("RGBA", (8, 8), (200, 10, 10, 255))
    image.paste((0, 0, 0, 0), (0, 4, 8, 8))
    return image


@pytest.mark.parametrize(
    "made",
    [
        lambda: rgba(),
        lambda: rgba().quantize(),
        lambda: rgba().convert("LA"),
        lambda: rgba().convert("LA").convert("La"),
        lambda: rgba().convert("RGBa"),
        lambda: rgba().convert("PA"),
    ],
    ids=["RGBA", "P", "LA", "La", "RGBa", "PA"],
)
def test_what_is_transparent_is_white_in_each_mode(made: Callable[[], Image.Image]) -> None:
    seen = preprocess_picture(made(), AS_IT_IS)
    assert (seen[:, 4:] == 255).all()
    assert (seen[:, :4] != 255).all()


def test_the_a_of_lab_is_a_colour() -> None:
    image = Image.new("LAB", (4, 4), (100, 130, 140))
    seen = preprocess_picture(image, AS_IT_IS)
    np.testing.assert_array_equal(seen, np.moveaxis(np.asarray(image.convert("RGB")), -1, 0))


@pytest.mark.parametrize("magic", [b"P5", b"P6"])
@pytest.mark.parametrize("largest", [1, 100, 254, 256, 1000, 65534])
def test_odd_largest_values_are_scaled_as_pillow_does(magic: bytes, largest: int) -> None:
    samples = np.random.default_rng(largest).integers(0, largest + 1, 9 * 7 * 3)
    body = samples.astype(np.uint8 if largest < 256 else ">u2").tobytes()
    encoded = magic + b"\n# odd\n9 7\n%d\n" % largest + body
    pillow = Image.open(io.BytesIO(encoded))
    np.testing.assert_array_equal(pixels_of(encoded), preprocess_picture(loaded(pillow), AS_IT_IS))


def loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image
