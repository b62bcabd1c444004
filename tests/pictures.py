"""Pictures that a test checkpoint has something to say about."""

from __future__ import annotations

import io
import struct
import zlib

from captionserve_server.evaluation.held_out import held_out_scenes
from PIL import Image

from tests.conftest import DEMO
from tests.reference import picture

PNG_START = b"\x89PNG\r\n\x1a\n"
BAD_TAG_EXIF = (
    b"Exif\0\0II*\0\x08\0\0\0\x02\0"
    b"\x12\x01\3\0\1\0\0\0\6\0\0\0"
    b"\x1a\x01\x0a\0\1\0\0\0\x26\0\0\0\0\0\0\0"
    b"\xff\xff\xff\xff\0\0\0\0"
)
"""Orientation 6, and a resolution of -1 / 0, which Pillow reads and cannot write."""


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


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey_png(depth: int, rows: bytes, width: int, height: int, key: int) -> bytes:
    """A grey PNG with a colour key; each row begins with its filter byte, 0."""
    return (
        PNG_START
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
        + png_chunk(b"tRNS", struct.pack(">H", key))
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def numbered(file: bytes, number: int) -> bytes:
    """A PNG file as another file of the same pixels, so that its answer is not remembered."""
    end = len(file) - len(png_chunk(b"IEND", b""))
    return file[:end] + png_chunk(b"tEXt", b"Comment\0%d" % number) + file[end:]
