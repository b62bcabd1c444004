"""From whatever a caller has for an image to the encoder's pixels.

Takes what the typed client takes, and makes of it what the service would. The client cannot be used
for it: it brings gRPC.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from captionserve_server.core.decode_budget import Reserve, without_limit
from captionserve_server.core.framing import WHOLE, Framing
from captionserve_server.core.preprocessing import (
    PreprocessorConfig,
    Views,
    pixels_of_values,
    preprocess,
    preprocess_array,
    preprocess_picture,
)


class BinaryReader(Protocol):
    """A file object opened in binary mode; it is read from its present position."""

    def read(self) -> bytes:
        """Everything up to the end."""


class FloatArray(Protocol):
    """A 3 x height x width array of floats: a numpy array or a torch tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """3, height, width; several images have their number before that."""

    @property
    def dtype(self) -> object:
        """The element type."""


ImageInput = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | BinaryReader
    | Image.Image
    | NDArray[np.uint8]
    | FloatArray
)
"""A path, an encoded image, a binary file object, a PIL image, a uint8 HxWx3 RGB array, or a float
array or tensor [3,H,W] as the checkpoint's own image processor makes it; where several images are
taken, also [B,3,H,W] of them."""

# Shorter texts may as well be names of files.
_LEAST_BASE64 = 200

# Modes whose samples have a fixed range, so that they can be shown.
_MODES = frozenset(
    {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "I", "I;16", "I;16B"}
    | {"CMYK", "YCbCr", "HSV", "LAB"}
)


def image_views(
    image: ImageInput,
    config: PreprocessorConfig,
    reserve: Reserve = without_limit,
    framing: Framing = WHOLE,
) -> Views:
    """Prepare an image, and the parts of it that are asked for, for the encoder.

    Args:
        image: paths are read; bytes-like values and file objects are taken as whole image files,
            and so is a JPEG or PNG that Pillow has opened and not yet read.
        config: the checkpoint's image processor.
        reserve: takes the memory that the image will need.
        framing: what is asked of it.

    Raises:
        TypeError: if the image is none of the kinds that are taken.
        ValueError: if an array has neither form, or a PIL image has no pixels or a mode without a
            fixed range.
        InvalidPixelValuesError: if a float array is not what the image processor makes.
        InvalidFramingError: if the image has no such parts; of a float array there are none.
        OSError: if a file cannot be read, such as FileNotFoundError; it says so where the path is
            a URL, a data URI or base64 text.
        ImageCorruptError: empty, truncated or damaged bytes.
        UnsupportedImageFormatError: bytes of another kind.
        ImageTooManyPixelsError: decided from the size, before anything is decoded.
    """
    if isinstance(image, Image.Image):
        shown = _shown(image)
        encoded = _file_of(shown)
        if encoded is None:
            return preprocess_picture(shown, config, reserve, framing)
        return preprocess(encoded, config, reserve, framing)
    if _is_floats(image):
        values = _values(image)
        framing.refuse_for_pixel_values()
        return Views((pixels_of_values(values, config),))
    if isinstance(image, np.ndarray):
        return preprocess_array(_rgb_samples(image), config, reserve, framing)
    return preprocess(_encoded(image), config, reserve, framing)


def each_image(images: Iterable[ImageInput]) -> Iterator[ImageInput]:
    """The images one by one, where an array of pixel values may hold several of them."""
    for image in images:
        if _is_floats(image) and len(cast(FloatArray, image).shape) == 4:
            yield from cast("Iterable[ImageInput]", image)
        else:
            yield image


def _is_floats(image: object) -> bool:
    """Whether this is an array or a tensor of floats; PyTorch itself need not be there."""
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":  # Of any byte order.
        return True
    return hasattr(image, "shape") and "float" in str(getattr(image, "dtype", ""))


def _values(image: Any) -> NDArray[np.float32]:
    shape = tuple(image.shape)
    if len(shape) == 4:
        raise ValueError(
            f"a float array of shape {shape} is several images: caption_all and caption_each take "
            "it, and one image is of shape (3, height, width)"
        )
    if len(shape) != 3 or shape[0] != 3 or 0 in shape:
        raise ValueError(
            f"a float array must be pixel values of shape (3, height, width), is of shape {shape}"
        )
    if str(image.dtype).startswith("torch."):
        # A tensor that lies on a GPU, that gradients flow through, or of bfloat16 is no array yet.
        image = image.detach().cpu().float()
    return np.asarray(image, dtype=np.float32)


def _encoded(image: Any) -> bytes:
    if isinstance(image, (str, os.PathLike)):
        return _read_path(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if not hasattr(image, "read"):
        raise TypeError(
            "an image must be a path, bytes, a binary file object, a PIL image or a uint8 array, "
            f"is {type(image).__name__}"
        )
    data = image.read()
    if not isinstance(data, bytes):
        raise TypeError("an image file object must be opened in binary mode")
    return data


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


def _rgb_samples(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            "an image array must be uint8 of shape (height, width, 3), "
            f"is {array.dtype} of shape {array.shape}"
        )
    return array


def _shown(image: Image.Image) -> Image.Image:
    if 0 in image.size:
        raise ValueError("an image must have pixels")
    if image.mode not in _MODES:
        raise ValueError(f"a PIL image of mode {image.mode} must be converted to RGB first")
    return image


def _file_of(image: Image.Image) -> bytes | None:
    """The file of a picture that Pillow has opened and not yet read; None for others.

    Pillow does not read all of it: a 16-bit PNG's colours lose a half, a transparent one does not.
    """
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
