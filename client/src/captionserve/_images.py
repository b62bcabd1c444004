"""From whatever a caller has for an image to the message that is sent.

Nothing is decoded that need not be: files and bytes pass through untouched. Pixels are written
without loss, as PPM (which needs no library) or PNG; pixel values go as they are.
"""

from __future__ import annotations

import errno
import io
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from captionserve.v1 import caption_pb2

if TYPE_CHECKING:
    from PIL import Image


class BinaryReader(Protocol):
    """A file object opened in binary mode; it is read from its present position."""

    def read(self) -> bytes:
        """Everything up to the end."""


class Uint8Array(Protocol):
    """A height x width x 3 array of uint8, RGB, such as numpy's."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width, 3."""

    @property
    def dtype(self) -> object:
        """The element type; its text is "uint8"."""

    def tobytes(self) -> bytes:
        """The elements in C order."""


class FloatArray(Protocol):
    """A 3 x height x width array of floats: a numpy array or a torch tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """3, height, width; several images have their number before that."""

    @property
    def dtype(self) -> object:
        """The element type; its text is "float32", "torch.float32", or of 16 or 64 bits."""


class PillowImage(Protocol):
    """A PIL.Image.Image; named by its parts so that Pillow need not be installed."""

    @property
    def mode(self) -> str:
        """Pillow's name of the pixel format."""

    @property
    def size(self) -> tuple[int, int]:
        """Width, height."""

    def tobytes(self) -> bytes:
        """The pixels, row by row."""

    def save(self, fp: BinaryIO, format: str) -> None:
        """Write an image file."""


ImageInput = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryReader
    | PillowImage
    | Uint8Array
    | FloatArray
)
"""A path, an encoded image, a binary file object, a PIL image, a uint8 HxWx3 RGB array, or the
float 3xHxW pixel values that the checkpoint's own image processor makes; where several images are
taken, also Bx3xHxW of them."""

# Foreign byte orders are numpy's; bfloat16 is torch's, and numpy's where ml_dtypes adds it.
_FLOAT_DTYPES = frozenset(
    {f"{owner}float{bits}" for owner in ("", "torch.") for bits in (16, 32, 64)}
    | {"bfloat16", "torch.bfloat16", ">f2", ">f4", ">f8"}
)

# Beyond this, pixels are compressed: a message of 64 MiB would not hold a large photo's.
_MAX_PLAIN_BYTES = 16 << 20
_PNG_FILTER_UP = 2
# Rows that are filtered at once.
_PNG_ROWS = 64
# Shorter texts may as well be names of files.
_LEAST_BASE64 = 200

_ORIENTATION_TAG = 0x0112
# What turns a picture upright, by its orientation, as Pillow calls it.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}

# Modes that PNG stores as they are.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B"})
# Modes with a lossless way to one that PNG stores; "I" holds 16-bit samples in 32 bits.
_CONVERT_FOR_PNG = {"PA": "RGBA", "RGBa": "RGBA", "I": "I;16"}
# Modes that no accepted format stores losslessly; the server would itself convert them like this.
_CONVERT_TO_RGB = frozenset({"CMYK", "YCbCr", "HSV", "LAB", "RGBX"})


def each_image(images: Iterable[ImageInput]) -> Iterator[ImageInput]:
    """The images one by one, where an array of pixel values may hold several of them."""
    for image in images:
        yield from images_of(image)


def images_of(image: ImageInput) -> Iterable[ImageInput]:
    """An image alone, or those of an array of pixel values of images x 3 x height x width."""
    if is_floats(image) and len(cast(FloatArray, image).shape) == 4:
        return cast("Iterable[ImageInput]", image)
    return (image,)


def is_floats(image: object) -> bool:
    """Whether this is an array or a tensor of floats; neither numpy nor PyTorch need be there."""
    return _has(image, "shape", "dtype") and str(cast(FloatArray, image).dtype) in _FLOAT_DTYPES


def image_message(image: ImageInput) -> caption_pb2.Image:
    """Give an image the form in which it is sent.

    An array of floats is sent as pixel values, for which numpy must be installed; all else as
    `encode_image` gives it.

    Raises:
        TypeError: if the value is no image.
        ValueError: if an array has a wrong form, or as `encode_image` says.
        OSError: if a file cannot be read.
    """
    if is_floats(image):
        return caption_pb2.Image(pixel_values=_pixel_values(image))
    return caption_pb2.Image(encoded=encode_image(image))


def _pixel_values(image: object) -> caption_pb2.PixelValues:
    # Who has such an array has numpy; who has none need not.
    import numpy as np

    array: Any = image
    shape = tuple(array.shape)
    if len(shape) == 4:
        raise ValueError(
            f"a float array of shape {shape} is several images: caption_many takes it, "
            "and one image is of shape (3, height, width)"
        )
    if len(shape) != 3 or shape[0] != 3 or 0 in shape:
        raise ValueError(
            f"a float array must be pixel values of shape (3, height, width), is of shape {shape}"
        )
    if str(array.dtype).startswith("torch."):
        # A tensor that lies on a GPU, that gradients flow through, or of bfloat16 is no array yet.
        array = array.detach().cpu().float()
    values = np.asarray(array, dtype="<f4")
    return caption_pb2.PixelValues(height=shape[1], width=shape[2], values=values.tobytes())


def encode_image(image: ImageInput) -> bytes:
    """Give an image the form of an encoded file.

    Paths are read; bytes-like values and file objects are taken as whole image files. A uint8
    array or an RGB PIL image becomes a binary PPM. A PIL image of another mode becomes a PNG, which
    keeps palette, transparency and 16-bit samples; CMYK, YCbCr, HSV, LAB and RGBX images are
    converted to RGB by Pillow. A PIL image is turned upright if its EXIF data say so, as the server
    does with files. A JPEG or PNG that Pillow has opened and not yet read is sent as it is.

    Pixels of more than 16 MiB are compressed: a photo takes about two thirds of them.

    Raises:
        TypeError: if the value is none of these.
        ValueError: if an array is not uint8 height x width x 3, or a PIL image has no pixels or a
            mode without a fixed range.
        OSError: if a file cannot be read, such as FileNotFoundError; it says so where the path is
            a URL, a data URI or base64 text.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read_path(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if _has(image, "read"):
        return _read(cast(BinaryReader, image))
    if _has(image, "mode", "size", "save", "tobytes"):
        return _encode_pillow(cast("Image.Image", image))
    if _has(image, "shape", "dtype", "tobytes"):
        return _encode_array(cast(Uint8Array, image))
    raise TypeError(
        "an image must be a path, bytes, a binary file object, a PIL image or a uint8 array, "
        f"is {type(image).__name__}"
    )


def _read_path(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError):  # ValueError: a NUL within.
        # Only what is no file is looked at: a file may have any name.
        content = _content_given_as_path(os.fspath(path))
        if content is None:
            raise
    raise FileNotFoundError(errno.ENOENT, f"an image must be a path or its bytes, not {content}")


def _content_given_as_path(path: str) -> str | None:
    """What of an image a text is if it is no path; None where it may well be one."""
    if re.match(r"data:[^,]*,", path, re.IGNORECASE):
        return "a data URI: decode it and give the bytes"
    # Path makes one slash of two.
    if re.match(r"[a-z][a-z0-9+.-]+:/", path, re.IGNORECASE):
        return "a URL: fetch it and give the bytes"
    if len(path) >= _LEAST_BASE64 and re.fullmatch(r"[A-Za-z0-9+/_\-\s]+=*\s*", path):
        return "base64 text: decode it and give the bytes"
    return None


def _has(value: object, *names: str) -> bool:
    return all(hasattr(value, name) for name in names)


def _read(file: BinaryReader) -> bytes:
    data = file.read()
    if not isinstance(data, bytes):
        raise TypeError("an image file object must be opened in binary mode")
    return data


def _encode_array(array: Uint8Array) -> bytes:
    shape = tuple(array.shape)
    if str(array.dtype) != "uint8" or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(
            "an image array must be uint8 of shape (height, width, 3), "
            f"is {array.dtype} of shape {shape}"
        )
    height, width, _ = shape
    rgb = array.tobytes()
    return (_ppm if len(rgb) <= _MAX_PLAIN_BYTES else _rgb_png)(width, height, rgb)


def _encode_pillow(image: Image.Image) -> bytes:
    if 0 in image.size:
        raise ValueError("an image must have pixels")
    encoded = _file_of(image)
    if encoded is not None:
        return encoded
    image = _upright(image)
    if image.mode in _CONVERT_TO_RGB:
        image = image.convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        if 3 * image.width * image.height > _MAX_PLAIN_BYTES:
            return _png(image)
        return _ppm(image.width, image.height, image.tobytes())
    return _png(image)


def _upright(image: Image.Image) -> Image.Image:
    # Pillow is there, since its image is.
    from PIL.Image import Transpose

    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # Damaged metadata raise anything, and say nothing.
        turn = None
    return image if turn is None else image.transpose(Transpose[turn])


def _file_of(image: Image.Image) -> bytes | None:
    """The file of a picture that Pillow has opened and not yet read; None for others.

    Pillow does not read all of it: a 16-bit PNG's colours lose a half, a transparent one does not.
    """
    from PIL import ImageFile

    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.fp is None:
        return None
    # A draft is smaller than its file.
    if image.format not in {"JPEG", "PNG"} or image.tell() != 0 or image.decoderconfig:
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    encoded = image.fp.read()
    image.fp.seek(place)
    return encoded


def _png(image: Image.Image) -> bytes:
    mode = _CONVERT_FOR_PNG.get(image.mode, image.mode)
    if mode not in _PNG_MODES:
        raise ValueError(f"a PIL image of mode {image.mode} must be converted to RGB first")
    converted = image if mode == image.mode else image.convert(mode)
    encoded = io.BytesIO()
    # The network is fast and the caller waits: little compression is enough.
    converted.save(encoded, format="PNG", compress_level=1)
    return encoded.getvalue()


def _rgb_png(width: int, height: int, rgb: bytes) -> bytes:
    """A PNG file of 24-bit pixels, quick to write: a photo takes about two thirds of its pixels."""
    # As for pixel values: who has so large an array has numpy.
    import numpy as np

    rows = np.frombuffer(rgb, np.uint8).reshape(height, 3 * width)
    # Runs only: of what differences leave, the search for longer repeats finds no more.
    compress = zlib.compressobj(1, zlib.DEFLATED, strategy=zlib.Z_RLE)
    parts = []
    for first in range(0, height, _PNG_ROWS):
        last = min(first + _PNG_ROWS, height)
        filtered = np.full((last - first, 1 + 3 * width), _PNG_FILTER_UP, np.uint8)
        filtered[:, 1:] = rows[first:last]
        # The difference from the row above, modulo 256; above the first there are zeros.
        start = int(first == 0)
        filtered[start:, 1:] -= rows[first + start - 1 : last - 1]
        parts.append(compress.compress(filtered.tobytes()))
    parts.append(compress.flush())
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b"".join(parts)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
    return struct.pack(">I", len(data)) + kind + data + checksum


def _ppm(width: int, height: int, rgb: bytes) -> bytes:
    """A binary PPM file: a header and the raw bytes."""
    return b"P6\n%d %d\n255\n" % (width, height) + rgb
