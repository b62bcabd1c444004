"""What a file is, that its metadata are not its pixels, and that what is transparent is white."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from captionserve_server.core import image_files
from captionserve_server.core.errors import (
    ImageCorruptError,
    ImageTooManyPixelsError,
    UnsupportedImageFormatError,
)
from captionserve_server.core.preprocessing import (
    PreprocessorConfig,
    preprocess,
    preprocess_picture,
)
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tests.pictures import BAD_TAG_EXIF, PNG_START, grey_png, png_chunk
from tests.reference import picture

AS_IT_IS = PreprocessorConfig(do_resize=False)


def file_of(image: Image.Image, kind: str, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def with_png_chunk(encoded: bytes, added: bytes, *, after_pixels: bool) -> bytes:
    place = encoded.rindex(b"IEND") - 4 if after_pixels else 33
    return encoded[:place] + added + encoded[place:]


def pixels_of(encoded: bytes) -> NDArray[np.uint8]:
    return preprocess(encoded, AS_IT_IS).whole


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
        png_chunk(b"zTXt", b"Workflow\0\0" + zlib.compress(bytes(3 << 20))),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))),
        png_chunk(b"iCCP", b"profile\0\0no zlib"),
        png_chunk(b"eXIf", b"garbage"),
        png_chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff"),
        png_chunk(b"pHYs", b""),
        png_chunk(b"gAMA", b""),
        png_chunk(b"tIME", b"1")[:-1] + b"?",
        png_chunk(b"acTL", b""),
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


@pytest.fixture(params=[1 << 18, 50], ids=["one tile", "many tiles"])
def tile_pixels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are put together of tiles, which here may be smaller than a row."""
    monkeypatch.setattr(image_files, "TILE_PIXELS", request.param)


@pytest.mark.usefixtures("tile_pixels")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_kept(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = file_of(picture(5), kind, exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    np.testing.assert_array_equal(pixels_of(encoded), np.moveaxis(np.asarray(turned), -1, 0))


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
RAW_EXIF = b"\nexif\n%8d\n%s\n" % (len(BAD_TAG_EXIF), BAD_TAG_EXIF.hex().encode())


@pytest.mark.parametrize(
    "added",
    [
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
        png_chunk(b"tEXt", b"Raw profile type exif\0" + RAW_EXIF),
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_EXIF)),
        png_chunk(b"eXIf", BAD_TAG_EXIF[6:]),
    ],
    ids=["XMP", "deflated XMP", "text", "deflated text", "EXIF"],
)
@pytest.mark.parametrize("after_pixels", [False, True])
def test_the_orientation_of_a_png_is_found(added: bytes, after_pixels: bool) -> None:
    changed = with_png_chunk(file_of(picture(4), "PNG"), added, after_pixels=after_pixels)
    turned = picture(4).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(pixels_of(changed), np.moveaxis(np.asarray(turned), -1, 0))


def test_the_orientation_of_a_jpegs_xmp_is_found() -> None:
    encoded = file_of(picture(4), "JPEG")
    payload = b"http://ns.adobe.com/xap/1.0/\0" + XMP
    segment = b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
    turned = Image.open(io.BytesIO(encoded)).transpose(Image.Transpose.ROTATE_270)
    seen = pixels_of(encoded[:2] + segment + encoded[2:])
    np.testing.assert_array_equal(seen, np.moveaxis(np.asarray(turned), -1, 0))


def test_a_tag_that_cannot_be_written_back_does_not_matter() -> None:
    good = Image.Exif()
    good[0x0112] = 6
    seen = pixels_of(file_of(picture(5), "JPEG", exif=BAD_TAG_EXIF))
    np.testing.assert_array_equal(seen, pixels_of(file_of(picture(5), "JPEG", exif=good)))


def test_a_canvas_beyond_pillows_own_limit_has_too_many_pixels() -> None:
    size = (16_383).to_bytes(3, "little") * 2
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size
    with pytest.raises(ImageTooManyPixelsError):
        pixels_of(b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk)


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


@pytest.mark.usefixtures("tile_pixels")
def test_a_colour_key_of_16_bits_is_one_colour() -> None:
    key = (0x1234, 0x5678, 0x9ABC)
    near = (0x1234, 0x5678, 0x9ABD)
    row = b"\0" + struct.pack(">6H", *key, *near)
    encoded = (
        PNG_START
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + png_chunk(b"tRNS", struct.pack(">3H", *key))
        + png_chunk(b"IDAT", zlib.compress(row))
        + png_chunk(b"IEND", b"")
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
    seen = preprocess_picture(made(), AS_IT_IS).whole
    assert (seen[:, 4:] == 255).all()
    assert (seen[:, :4] != 255).all()


def test_the_a_of_lab_is_a_colour() -> None:
    image = Image.new("LAB", (4, 4), (100, 130, 140))
    seen = preprocess_picture(image, AS_IT_IS).whole
    np.testing.assert_array_equal(seen, np.moveaxis(np.asarray(image.convert("RGB")), -1, 0))


@pytest.mark.usefixtures("tile_pixels")
@pytest.mark.parametrize("magic", [b"P5", b"P6"])
@pytest.mark.parametrize("largest", [1, 100, 254, 256, 1000, 65534])
def test_odd_largest_values_are_scaled_as_pillow_does(magic: bytes, largest: int) -> None:
    samples = np.random.default_rng(largest).integers(0, largest + 1, 9 * 7 * 3)
    body = samples.astype(np.uint8 if largest < 256 else ">u2").tobytes()
    encoded = magic + b"\n# odd\n9 7\n%d\n" % largest + body
    pillow = Image.open(io.BytesIO(encoded))
    expected = preprocess_picture(loaded(pillow), AS_IT_IS).whole
    np.testing.assert_array_equal(pixels_of(encoded), expected)


@pytest.mark.parametrize("magic", [b"P2", b"P3"])
@pytest.mark.parametrize("largest", [1, 100, 255, 256, 65535])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_plain_samples_are_read_as_pillow_does(
    magic: bytes, largest: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "_PLAIN_BLOCK_BYTES", block)
    samples = np.random.default_rng(largest).integers(0, largest + 1, 9 * 7 * 3)
    numbers = [b"%d" % sample for sample in samples]
    body = b" \n".join([*numbers[:5], b"# 7 7 7", *numbers[5:]])
    encoded = magic + b"\n9 7\n%d\n" % largest + body
    pillow = Image.open(io.BytesIO(encoded))
    expected = preprocess_picture(loaded(pillow), AS_IT_IS).whole
    np.testing.assert_array_equal(pixels_of(encoded), expected)


@pytest.mark.parametrize(
    "body", [b"1 2 3", b"1 2 3 10", b"1 2 3 -4", b"1 2 3 x", b"1 2 3 " + b"9" * 30]
)
def test_a_damaged_plain_pnm_is_corrupt(body: bytes) -> None:
    with pytest.raises(ImageCorruptError):
        pixels_of(b"P2 2 2 9\n" + body)


def loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image
