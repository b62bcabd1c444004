"""From an encoded image file to the encoder's pixels, as the checkpoint's image processor does it.

Everything is Pillow and numpy; the order of operations and the defaults are those of transformers'
PIL image processors. What transformers leaves to the caller (orientation, transparency, 16-bit
samples) is settled here so that a caption describes what a person sees. Rescaling and normalisation
are not done here: they are part of the encoder graph.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from captionserve_server.core.errors import (
    ImageCorruptError,
    ImageTooManyPixelsError,
    InvalidRequestError,
    UnsupportedImageFormatError,
)

# An allow-list: Pillow's other readers run Ghostscript (EPS) or parse what no photo needs.
ACCEPTED_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
# The first bytes of those formats, to tell a damaged image from something that is no image.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"GIF8", b"P4", b"P5", b"P6")
# Decoding holds 3 to 4 bytes per pixel; 50 megapixels, a large phone's photo, is 200 MB.
MAX_PIXELS = 50_000_000
_UINT16_TO_UINT8 = 255.0 / 65535.0
# How far float32 may lie from the whole pixel that it stands for; half precision does, too.
_NEAR_A_PIXEL = 0.1

Pixels = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class PreprocessorConfig:
    """What a checkpoint's image processor does, after its defaults have been filled in.

    Attributes:
        do_resize: whether the image is resized.
        height: height in pixels after resizing; None when the short edge decides.
        width: width in pixels after resizing; None when the short edge decides.
        shortest_edge: length in pixels of the short edge after resizing, the aspect kept.
        resample: Pillow's number of the resampling filter.
        do_center_crop: whether the middle is cut out after resizing.
        crop_height: height in pixels of that cut.
        crop_width: width in pixels of that cut.
        do_rescale: whether the encoder graph multiplies pixels by rescale_factor.
        rescale_factor: usually 1 / 255.
        do_normalize: whether the encoder graph subtracts image_mean and divides by image_std.
        image_mean: per channel, red first.
        image_std: per channel, red first.
    """

    do_resize: bool = True
    height: int | None = 224
    width: int | None = 224
    shortest_edge: int | None = None
    resample: int = Image.Resampling.BILINEAR
    do_center_crop: bool = False
    crop_height: int = 224
    crop_width: int = 224
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PreprocessorConfig:
        """Read what `dataclasses.asdict` wrote."""
        tuples = {name: tuple(values[name]) for name in ("image_mean", "image_std")}
        return cls(**{**values, **tuples})

    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every result; None when it follows the image."""
        if self.do_center_crop:
            return self.crop_height, self.crop_width
        if self.do_resize and self.height is not None and self.width is not None:
            return self.height, self.width
        return None


# transformers' class defaults, by what preprocessor_config.json calls the processor.
_VIT = PreprocessorConfig()
_DEIT = PreprocessorConfig(
    height=256, width=256, resample=Image.Resampling.BICUBIC, do_center_crop=True
)
_DEFAULTS_BY_TYPE = {
    "ViTImageProcessor": _VIT,
    "ViTImageProcessorFast": _VIT,
    "ViTImageProcessorPil": _VIT,
    "ViTFeatureExtractor": _VIT,
    "DeiTImageProcessor": _DEIT,
    "DeiTImageProcessorFast": _DEIT,
    "DeiTImageProcessorPil": _DEIT,
    "DeiTFeatureExtractor": _DEIT,
}
SUPPORTED_PROCESSORS = tuple(_DEFAULTS_BY_TYPE)


def read_preprocessor_config(values: object) -> PreprocessorConfig:
    """Read a preprocessor_config.json as transformers' PIL image processors do.

    What it does not name has its processor's default; what it names as null is off.

    Args:
        values: the file's content.

    Raises:
        ValueError: if the processor or one of its settings is not supported; names both.
    """
    if not isinstance(values, Mapping):
        raise ValueError("the image processor's settings must be a JSON object")
    kind = values.get("image_processor_type") or values.get("feature_extractor_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS_BY_TYPE:
        raise ValueError(
            f"image processor {kind!r} is not supported; supported are "
            f"{', '.join(SUPPORTED_PROCESSORS)}"
        )
    defaults = _DEFAULTS_BY_TYPE[kind]
    if values.get("do_pad"):
        raise ValueError("do_pad is not supported by the image processor")
    on = {
        name: _flag(name, values.get(name, getattr(defaults, name)))
        for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    }
    # A setting that is never used may have any value, as in transformers.
    given: dict[str, Any] = dict(on)
    if on["do_resize"]:
        square = values.get("default_to_square", True)
        given |= _resize_target(values["size"], bool(square)) if "size" in values else {}
        given |= {"resample": _filter(values["resample"])} if "resample" in values else {}
    if on["do_center_crop"]:
        given |= _crop(values, kind)
    if on["do_rescale"] and "rescale_factor" in values:
        given["rescale_factor"] = _number("rescale_factor", values["rescale_factor"])
    if on["do_normalize"]:
        means = {n: _per_channel(n, values[n]) for n in ("image_mean", "image_std") if n in values}
        given |= means
        if 0.0 in means.get("image_std", ()):
            raise ValueError("image_std must not be 0")
    return dataclasses.replace(defaults, **given)


def _flag(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true, false or null, is {value!r:.40}")
    return bool(value)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, is {value!r:.40}")
    return float(value)


def _pixels(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_PIXELS:
        raise ValueError(f"{name} must have whole numbers of pixels, has {value!r:.40}")
    return value


def _filter(value: object) -> int:
    """Pillow's number of a resampling filter."""
    if value is None:
        return Image.Resampling.BILINEAR
    if isinstance(value, str) and value.upper() in Image.Resampling.__members__:
        # Whatever the name: transformers knows the numbers only and takes bilinear for the rest.
        return Image.Resampling.BILINEAR
    known = [one.value for one in Image.Resampling]
    if isinstance(value, bool) or not isinstance(value, int) or value not in known:
        raise ValueError(f"resample {value!r:.40} is no filter; filters are 0 to {max(known)}")
    return value


def _per_channel(name: str, value: object) -> tuple[float, float, float]:
    """A number for each of the three channels, or one for all."""
    several = value if isinstance(value, (list, tuple)) else (value,)
    numbers = [_number(name, each) for each in several]
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise ValueError(f"{name} must have 3 numbers or one, has {len(numbers)}")
    return numbers[0], numbers[1], numbers[2]


def _crop(values: Mapping[str, Any], kind: str) -> dict[str, int | None]:
    if "crop_size" not in values and not _DEFAULTS_BY_TYPE[kind].do_center_crop:
        raise ValueError("do_center_crop needs a crop_size")
    crop = _resize_target(values.get("crop_size", 224), True, "crop_size")
    if crop["height"] is None:
        raise ValueError("crop_size must be given as height and width")
    return {"crop_height": crop["height"], "crop_width": crop["width"]}


def _resize_target(size: object, square: bool, name: str = "size") -> dict[str, int | None]:
    """The ways a size is written: a number, [height, width], or a dict."""
    if isinstance(size, (list, tuple)) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    elif isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if isinstance(size, Mapping) and set(size) in ({"height", "width"}, {"shortest_edge"}):
        edges = {edge: _pixels(name, value) for edge, value in size.items()}
        return {edge: edges.get(edge) for edge in ("height", "width", "shortest_edge")}
    raise ValueError(f"{name} {size!r:.60} is not supported; use height and width or shortest_edge")


def preprocess(encoded: bytes, config: PreprocessorConfig) -> Pixels:
    """Decode an image file and prepare it for the encoder.

    Args:
        encoded: a JPEG, PNG, WebP, BMP, GIF or PPM file.
        config: the checkpoint's image processor.

    Returns:
        uint8 [3, height, width], RGB, 0 to 255.

    Raises:
        ImageCorruptError: empty, truncated or damaged bytes.
        UnsupportedImageFormatError: bytes of another kind.
        ImageTooManyPixelsError: decided from the header, before anything is decoded.
    """
    return to_pixels(decode_image(encoded), config)


def pixels_of_values(values: NDArray[np.float32], config: PreprocessorConfig) -> Pixels:
    """The encoder's pixels of an image that the checkpoint's own image processor has prepared.

    The processor computes (pixel * rescale_factor - image_mean) / image_std, for whole pixels of 0
    to 255; this finds them again, exactly.

    Args:
        values: float32 [3, height, width].
        config: the checkpoint's image processor.

    Returns:
        uint8 [3, height, width].

    Raises:
        InvalidRequestError: if the size is another than the processor's, or the values are none
            that it makes.
    """
    if values.ndim != 3 or values.shape[0] != 3 or values.shape[1:] != config.output_size():
        raise InvalidRequestError(
            f"pixel values must have the shape {(3, *(config.output_size() or ()))}, "
            f"have {values.shape}"
        )
    pixels = values.astype(np.float64)
    if config.do_normalize:
        std, mean = np.array(config.image_std), np.array(config.image_mean)
        pixels = pixels * std[:, None, None] + mean[:, None, None]
    if config.do_rescale:
        pixels = pixels / config.rescale_factor
    whole = np.rint(pixels)
    # NaN is near to nothing and within no range.
    near = (np.abs(pixels - whole) <= _NEAR_A_PIXEL) & (whole >= 0) & (whole <= 255)
    if not near.all():
        raise InvalidRequestError(
            "the pixel values are not what the checkpoint's image processor makes of an image"
        )
    return whole.astype(np.uint8)


def decode_image(encoded: bytes) -> Image.Image:
    """Decode an image file to an upright RGB picture; errors as `preprocess` raises them."""
    return upright_rgb(_open(encoded))


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture upright and convert it to RGB.

    Args:
        image: a picture in memory, or of a file that has been opened and not yet read.

    Raises:
        ImageCorruptError: if its file is truncated or damaged.
        ImageTooManyPixelsError: decided from its size, before anything is decoded.
    """
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageTooManyPixelsError(
            f"the image has {width * height} pixels, at most {MAX_PIXELS} are accepted"
        )
    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Damaged files raise anything: OSError, SyntaxError, struct.error.
        raise ImageCorruptError("the image is damaged or incomplete") from error


def _open(encoded: bytes) -> Image.Image:
    if not encoded:
        raise ImageCorruptError("the image is empty")
    try:
        return Image.open(io.BytesIO(encoded), formats=ACCEPTED_FORMATS)
    except UnidentifiedImageError as error:
        if encoded.startswith(_SIGNATURES):
            raise ImageCorruptError("the image is damaged or incomplete") from error
        names = ", ".join(ACCEPTED_FORMATS)
        raise UnsupportedImageFormatError(f"not an image of an accepted format: {names}") from error
    # Pillow's limits are above ours. A warning is raised where the process has it so.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooManyPixelsError(
            f"the image has more than {MAX_PIXELS} pixels, which is the most accepted"
        ) from error
    except Exception as error:  # A damaged header raises anything, like a damaged body.
        raise ImageCorruptError("the image is damaged or incomplete") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: 16-bit samples rescaled, transparency composited on white."""
    if image.mode.startswith("I"):
        samples = np.asarray(image, dtype=np.float64).clip(0, 65535)
        return Image.fromarray((samples * _UINT16_TO_UINT8).round().astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def to_pixels(image: Image.Image, config: PreprocessorConfig) -> Pixels:
    """Resize and crop an RGB picture; uint8 [3, height, width]."""
    if config.do_resize:
        height, width = _resized_size(image, config)
        image = image.resize((width, height), resample=Image.Resampling(config.resample))
    pixels = np.moveaxis(np.asarray(image), -1, 0)
    if config.do_center_crop:
        pixels = _center_crop(pixels, config.crop_height, config.crop_width)
    return np.ascontiguousarray(pixels)


def _resized_size(image: Image.Image, config: PreprocessorConfig) -> tuple[int, int]:
    if config.height is not None and config.width is not None:
        return config.height, config.width
    assert config.shortest_edge is not None
    short, long = sorted(image.size)
    new_long = int(config.shortest_edge * long / short)
    if config.shortest_edge * new_long > MAX_PIXELS:
        raise ImageTooManyPixelsError(
            f"resizing the image, {image.width} x {image.height}, to a short edge of "
            f"{config.shortest_edge} gives more than {MAX_PIXELS} pixels"
        )
    if image.width <= image.height:
        return new_long, config.shortest_edge
    return config.shortest_edge, new_long


def _center_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """Cut [3, height, width] out of the middle; what lies outside the picture is black."""
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    cropped = np.zeros((3, height, width), dtype=np.uint8)
    rows = slice(max(top, 0), min(top + height, pixels.shape[1]))
    columns = slice(max(left, 0), min(left + width, pixels.shape[2]))
    cropped[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = (
        pixels[:, rows, columns]
    )
    return cropped
