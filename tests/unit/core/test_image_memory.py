"""What an image takes while it is decoded: at most eight bytes a pixel, and what was reserved."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captionserve_server.core.errors import ImageTooManyPixelsError
from captionserve_server.core.framing import MAX_REGIONS, WHOLE, Framing
from captionserve_server.core.image_files import decoding_bytes, open_image_file
from captionserve_server.core.preprocessing import (
    PreprocessorConfig,
    preprocess,
    preprocess_array,
    preprocess_picture,
)
from captionserve_server.local.images import image_views
from PIL import Image

CONFIG = PreprocessorConfig()
WIDTH, HEIGHT = 3000, 2000
PIXELS = WIDTH * HEIGHT
# Tiles, readers, the resized picture and what the allocator keeps do not grow with the picture.
SLACK_BYTES = 12 << 20

# Each file in a process of its own, since a peak never comes down again.
PEAKS = """
import json, os, pathlib, sys
from captionserve_server.core.framing import Framing
from captionserve_server.core.preprocessing import PreprocessorConfig, preprocess

framing = Framing.of(**json.loads(sys.argv[1]))

def peak(encoded, framing=framing):
    child = os.fork()
    if not child:
        preprocess(encoded, PreprocessorConfig(), framing=framing)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status == 0
    return usage.ru_maxrss * 1024

files = [path.read_bytes() for path in map(pathlib.Path, sys.argv[2:])]
nothing = peak(b"P5 1 1 255 0", Framing())
print(json.dumps([peak(encoded) - nothing for encoded in files]))
"""


def file_of(kind: str, mode: str, turn: int = 1, **how: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = turn
    file = io.BytesIO()
    Image.new(mode, (WIDTH, HEIGHT)).save(file, kind, exif=exif, **how)
    return file.getvalue()


def png_of_16_bit_colours() -> bytes:
    """With a colour key."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)),
        (b"tRNS", bytes(6)),
        (b"IDAT", zlib.compress(bytes(HEIGHT * (1 + 6 * WIDTH)), 1)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


SEQUENTIAL: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: file_of("PNG", "RGB"),
    "PNG turned": lambda: file_of("PNG", "RGB", 6),
    "16 bits": lambda: file_of("PNG", "I;16"),
    "16 bits of colour": png_of_16_bit_colours,
    "LA": lambda: file_of("PNG", "LA"),
    "RGBA turned": lambda: file_of("PNG", "RGBA", 7),
    "palette": lambda: file_of("PNG", "P", transparency=0),
    "JPEG turned": lambda: file_of("JPEG", "RGB", 8),
    "CMYK turned": lambda: file_of("JPEG", "CMYK", 5),
    "progressive": lambda: file_of("JPEG", "RGB", progressive=True),
    "GIF": lambda: file_of("GIF", "P"),
    "BMP": lambda: file_of("BMP", "RGB"),
    "PPM": lambda: b"P6 %d %d 255\n" % (WIDTH, HEIGHT) + bytes(3 * PIXELS),
    "odd PPM": lambda: b"P6 %d %d 999\n" % (WIDTH, HEIGHT) + bytes(6 * PIXELS),
    "plain PPM": lambda: b"P3 %d %d 9\n" % (WIDTH, HEIGHT) + b"7 " * (3 * PIXELS),
}
# libjpeg keeps all coefficients, libwebp two canvases and its result: nothing of ours adds to it.
LARGER: dict[str, tuple[int, Callable[[], bytes]]] = {
    "progressive without subsampling": (
        10,
        lambda: file_of("JPEG", "RGB", progressive=True, subsampling=0),
    ),
    "progressive CMYK": (12, lambda: file_of("JPEG", "CMYK", 6, progressive=True)),
    "WebP": (12, lambda: file_of("WEBP", "RGB", method=0)),
    "lossless WebP turned": (12, lambda: file_of("WEBP", "RGBA", 6, lossless=True, method=0)),
}


class Reserved:
    """Whether something is reserved."""

    def __init__(self) -> None:
        self.held = False

    @contextmanager
    def __call__(self, size: int) -> Iterator[None]:
        self.held = True
        yield
        self.held = False


@pytest.fixture(scope="module")
def files() -> dict[str, tuple[int, bytes]]:
    """Bytes a pixel that a file may take, and the file, by its name."""
    limits = {name: (8, made()) for name, made in SEQUENTIAL.items()}
    return limits | {name: (limit, made()) for name, (limit, made) in LARGER.items()}


def test_each_image_takes_what_was_reserved(
    files: dict[str, tuple[int, bytes]], tmp_path: Path
) -> None:
    peaks = dict(zip(files, peaks_of([each for _, each in files.values()], tmp_path), strict=True))
    wrong = {}
    for name, (limit, encoded) in files.items():
        reserved = reserved_for(encoded)
        allowed = min(limit * PIXELS, reserved) + SLACK_BYTES
        if peaks[name] > allowed or reserved > limit * PIXELS + SLACK_BYTES:
            wrong[name] = peaks[name] / PIXELS, reserved / PIXELS
    assert wrong == {}


@pytest.mark.parametrize(
    "asked",
    [
        {"regions": [(0, 0, HEIGHT, HEIGHT)] * MAX_REGIONS},
        {"tiles": (4, 4)},
        {"resize": "letterbox"},
        {"resize": "center_crop", "regions": [(0, 0, HEIGHT, 40)]},
    ],
    ids=["regions", "tiles", "letterbox", "center_crop"],
)
@pytest.mark.parametrize("kind", ["PNG", "RGBA turned"])
def test_parts_take_what_was_reserved(
    kind: str, asked: Any, files: dict[str, tuple[int, bytes]], tmp_path: Path
) -> None:
    _, encoded = files[kind]
    (peak,) = peaks_of([encoded], tmp_path, asked)
    reserved = reserved_for(encoded, Framing.of(**asked))
    assert peak <= reserved + SLACK_BYTES
    # One after the other: so many parts take one more picture, not sixteen.
    assert reserved <= reserved_for(encoded) + 8 * PIXELS


def peaks_of(encoded: list[bytes], folder: Path, asked: object = None) -> list[int]:
    """The memory that each of the files takes in a process of its own, in bytes."""
    paths = [folder / str(number) for number in range(len(encoded))]
    for path, content in zip(paths, encoded, strict=True):
        path.write_bytes(content)
    command = [sys.executable, "-c", PEAKS, json.dumps(asked or {}), *map(str, paths)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peaks: list[int] = json.loads(done.stdout)
    return peaks


def reserved_for(encoded: bytes, framing: Framing = WHOLE) -> int:
    sizes: list[int] = []

    def reserve(size: int) -> AbstractContextManager[None]:
        sizes.append(size)
        return refuse(size)

    with pytest.raises(RuntimeError, match="no room"):
        preprocess(encoded, CONFIG, reserve, framing)
    return sizes[0]


def test_a_jpeg_of_several_scans_is_reserved_its_coefficients() -> None:
    one_scan = file_of("JPEG", "RGB", subsampling=0)
    start = one_scan.index(b"\xff\xda")
    # Of the first component alone.
    several = one_scan[:start] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + one_scan[start + 14 :]
    assert decoding_bytes(open_image_file(one_scan)) == 4 * PIXELS
    assert decoding_bytes(open_image_file(several)) >= 10 * PIXELS


def test_a_picture_of_a_caller_is_decoded_after_its_size_is_known_and_reserved() -> None:
    file = io.BytesIO()
    Image.new("L", (300, 200)).save(file, "PNG")
    image = Image.open(file)
    reserved = Reserved()

    decode = image.load

    def load() -> None:
        assert reserved.held
        decode()

    image.load = load  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no room"):
        preprocess_picture(image, CONFIG, refuse)
    preprocess_picture(image, CONFIG, reserved)


def refuse(size: int) -> AbstractContextManager[None]:
    raise RuntimeError("no room")


@pytest.mark.parametrize(
    "image",
    [np.zeros((2, 3, 3), np.uint8), Image.new("RGBA", (3, 2))],
    ids=["array", "picture"],
)
def test_pixels_of_a_caller_are_copied_only_into_what_is_reserved(image: object) -> None:
    with pytest.raises(RuntimeError, match="no room"):
        image_views(image, CONFIG, refuse)  # type: ignore[arg-type]


def test_an_array_has_the_limit_of_files() -> None:
    # Nothing is copied: these are 153 MB of one byte.
    array = np.broadcast_to(np.uint8(7), (5001, 10_000, 3))
    with pytest.raises(ImageTooManyPixelsError):
        preprocess_array(array, CONFIG, refuse)
