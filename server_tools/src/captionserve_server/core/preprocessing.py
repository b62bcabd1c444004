"""From an encoded image file to the encoder's pixels, as the checkpoint's image processor does it.

Everything is Pillow and numpy; the order of operations and the defaults are those of transformers'
PIL image processors. What transformers leaves to the caller (orientation, transparency, 16-bit
samples) is settled here so that a caption describes what a person sees. Rescaling and normalisation
are not done here: they are part of the encoder graph.

Parts of an image are cut out of the upright picture in full resolution, and each is resized as if
it were a file of its own. There are three ways of resizing, all with the checkpoint's filter:

    checkpoint    as the checkpoint's image processor does it
    center_crop   the smallest picture of the same aspect that covers the encoder's size, its longer
                  side rounded down, and the middle of that: what transformers' processors do with
                  size={"shortest_edge": n}, do_center_crop and crop_size=n
    letterbox     the largest picture of the same aspect that fits into it, its shorter side
                  rounded, in the middle of the colour that is nearest to what normalising makes 0:
                  what Pillow's ImageOps.pad does
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from captionserve_server.core.decode_budget import Reserve, without_limit
from captionserve_server.core.errors import (
    ImageCorruptError,
    ImageTooManyPixelsError,
    InvalidPixelValuesError,
)
from captionserve_server.core.framing import WHOLE, Framing, Resize
from captionserve_server.core.image_files import (
    MAX_PIXELS,
    RGB_BYTES_PER_PIXEL,
    TILE_PIXELS,
    Box,
    check_size,
    decoding_bytes,
    load_image,
    open_image_file,
    orientation_turn,
    source_box,
    tiles,
    turned_size,
)

# Decoded pictures by mode, where they take less than RGB.
_SMALL_BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2}
# The resized picture, and its samples in two orders.
_RESULT_BYTES_PER_PIXEL = 10
# What is made of a tile on its way to RGB.
_TILE_BYTES_PER_PIXEL = 32
_UINT16_TO_UINT8 = 255.0 / 65535.0
# How far float32 may lie from the whole pixel that it stands for; half precision does, too.
_NEAR_A_PIXEL = 0.1
# What rounding to bfloat16 changes of a value, as a share of it, and the bits that it makes zero.
_BFLOAT16_SHARE = 2.0**-8
_BITS_BELOW_BFLOAT16 = 0xFFFF

Pixels = NDArray[np.uint8]
_Opened = TypeVar("_Opened", bound=Image.Image)


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

    def encoder_size(self) -> tuple[int, int]:
        """(height, width) that the encoder reads; export refuses a processor that makes none."""
        size = self.output_size()
        assert size is not None, "the results' size follows the image"
        return size

    def zero_colour(self) -> tuple[int, int, int]:
        """The RGB colour of whole numbers that is nearest to what normalising makes 0."""
        mean = np.array(self.image_mean if self.do_normalize else (0.0, 0.0, 0.0))
        colour = np.rint(mean / self.rescale_factor if self.do_rescale else mean)
        red, green, blue = colour.clip(0, 255).astype(int).tolist()
        return red, green, blue


@dataclasses.dataclass(frozen=True)
class Views:
    """An image as the encoder reads it, and its parts.

    Attributes:
        pixels: uint8 [3, height, width] each, RGB, 0 to 255: the whole, then the parts.
        boxes: where the parts are, in pixels of the upright image.
    """

    pixels: tuple[Pixels, ...]
    boxes: tuple[Box, ...] = ()

    @property
    def whole(self) -> Pixels:
        """The whole image."""
        return self.pixels[0]


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


def preprocess(
    encoded: bytes,
    config: PreprocessorConfig,
    reserve: Reserve = without_limit,
    framing: Framing = WHOLE,
) -> Views:
    """Decode an image file, once, and prepare it and the parts asked for for the encoder.

    Args:
        encoded: a JPEG, PNG, WebP, BMP, GIF or PPM file.
        config: the checkpoint's image processor.
        reserve: takes the memory that the image will need, by its header.
        framing: what is asked of it.

    Raises:
        ImageCorruptError: empty, truncated or damaged bytes.
        UnsupportedImageFormatError: bytes of another kind.
        ImageTooManyPixelsError: decided from the header, before anything is decoded.
        InvalidFramingError: likewise, if the image has no such parts.
        CaptionServeError: what `reserve` raises.
    """
    image = open_image_file(encoded)
    return _prepared(image, load_image, config, reserve, framing, keep=False)


def preprocess_picture(
    image: Image.Image,
    config: PreprocessorConfig,
    reserve: Reserve = without_limit,
    framing: Framing = WHOLE,
) -> Views:
    """Prepare a picture for the encoder that Pillow has in memory, or has opened.

    Args:
        image: of a mode whose samples have a fixed range; it is left as it is.
        config: as for `preprocess`.
        reserve: likewise.
        framing: likewise.

    Returns:
        as `preprocess`, and raises the same.
    """
    return _prepared(image, _loaded, config, reserve, framing, keep=True)


def preprocess_array(
    array: NDArray[np.uint8],
    config: PreprocessorConfig,
    reserve: Reserve = without_limit,
    framing: Framing = WHOLE,
) -> Views:
    """Prepare samples for the encoder.

    Args:
        array: uint8 [height, width, 3], RGB.
        config: as for `preprocess`.
        reserve: likewise.
        framing: likewise.

    Returns:
        as `preprocess`.

    Raises:
        ImageTooManyPixelsError: decided from the shape.
        InvalidFramingError: likewise.
        CaptionServeError: what `reserve` raises.
    """
    height, width, _ = array.shape
    check_size(width, height)
    boxes = framing.boxes(width, height)
    reading = RGB_BYTES_PER_PIXEL * width * height
    with _room((width, height), boxes, reading, config, framing.resize, reserve):
        return _views(Image.fromarray(array), boxes, config, framing.resize)


def _loaded(image: Image.Image) -> Image.Image:
    image.load()
    return image


def _prepared(
    image: _Opened,
    load: Callable[[_Opened], Image.Image],
    config: PreprocessorConfig,
    reserve: Reserve,
    framing: Framing,
    *,
    keep: bool,
) -> Views:
    check_size(*image.size)
    turn = orientation_turn(image)
    size = turned_size(image.size, turn)
    boxes = framing.boxes(*size)
    with _room(size, boxes, _reading_bytes(image, turn), config, framing.resize, reserve):
        try:
            picture = load(image)
            upright = _upright_rgb(picture, turn)
            if not keep and upright is not picture:
                # References to it may be left; its pixels must not be.
                picture.close()
        except Exception as error:  # Damaged files raise anything: OSError, SyntaxError.
            raise ImageCorruptError("the image is damaged or incomplete") from error
        return _views(upright, boxes, config, framing.resize)


def _views(
    upright: Image.Image, boxes: Sequence[Box], config: PreprocessorConfig, resize: Resize
) -> Views:
    whole = to_pixels(upright, config, resize)
    # Cut out first: Pillow's resize of a box looks beyond its edges.
    parts = (to_pixels(upright.crop(box), config, resize) for box in boxes)
    return Views((whole, *parts), tuple(boxes))


def _room(
    size: tuple[int, int],
    boxes: Sequence[Box],
    reading: int,
    config: PreprocessorConfig,
    resize: Resize,
    reserve: Reserve,
) -> AbstractContextManager[None]:
    """Reserve what an image takes from its file to the encoder's pixels.

    Args:
        size: width and height of the upright picture.
        boxes: its parts.
        reading: bytes that it takes until it is upright and RGB.
        config: as for `preprocess`.
        resize: how the picture and its parts are resized.
        reserve: as for `preprocess`.

    Raises:
        ImageTooManyPixelsError: if it, or a part, is so narrow or wide that resizing it takes too
            many.
    """
    resizing = _resizing_bytes(*size, config, resize)
    if not boxes:
        return reserve(reading + resizing)
    sizes = [(right - left, bottom - top) for left, top, right, bottom in boxes]
    # One after the other; all results are kept.
    of_parts = (
        RGB_BYTES_PER_PIXEL * w * h + _resizing_bytes(w, h, config, resize) for w, h in sizes
    )
    kept = len(boxes) * 3 * math.prod(config.encoder_size())
    return reserve(reading + max(resizing, *of_parts) + kept)


def _resizing_bytes(width: int, height: int, config: PreprocessorConfig, resize: Resize) -> int:
    """What resizing a picture takes, the result included; raises what `_room` does."""
    new_height, new_width = _resized_size(width, height, config, resize)
    if new_width * max(height, new_height) > MAX_PIXELS:
        raise ImageTooManyPixelsError(
            f"resizing the image, {width} x {height}, takes more than {MAX_PIXELS} pixels"
        )
    # The picture between Pillow's two passes: it shrinks in height first only if that makes less.
    between = max(new_width * height, width * min(height, new_height))
    return RGB_BYTES_PER_PIXEL * between + _RESULT_BYTES_PER_PIXEL * new_width * new_height


def _reading_bytes(image: Image.Image, turn: Image.Transpose | None) -> int:
    """What a picture takes at most until it is upright and RGB."""
    pixels = image.width * image.height
    if _is_upright_rgb(image, turn):
        return decoding_bytes(image)
    decoded = _SMALL_BYTES_PER_PIXEL.get(image.mode, RGB_BYTES_PER_PIXEL) * pixels
    converted = RGB_BYTES_PER_PIXEL * pixels + _TILE_BYTES_PER_PIXEL * min(pixels, TILE_PIXELS)
    return max(decoding_bytes(image), decoded + converted)


def _upright_rgb(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """Turn a picture, put it on white and convert it."""
    if _is_upright_rgb(image, turn):
        return image
    size = turned_size(image.size, turn)
    upright = Image.new("RGB", size)
    # By tiles, so that what lies between the two stays small.
    for box in tiles(*size):
        tile = image.crop(source_box(box, size, turn))
        upright.paste(_rgb(tile if turn is None else tile.transpose(turn)), box)
    return upright


def _is_upright_rgb(image: Image.Image, turn: Image.Transpose | None) -> bool:
    return turn is None and image.mode == "RGB" and not _is_transparent(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: 16-bit samples rescaled, what is transparent put on white."""
    if image.mode.startswith("I"):
        return _grey_of_16_bits(image).convert("RGB")
    if _is_transparent(image):
        return _on_white(image)
    return image.convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    # By the mode, not by its letters: the A of LAB is a colour.
    return (
        image.mode in {"LA", "La", "PA", "RGBA", "RGBa"}
        or image.info.get("transparency") is not None
        or (image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA")
    )


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    samples = np.asarray(image, dtype=np.float64).clip(0, 65535)
    grey = (samples * _UINT16_TO_UINT8).round().astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[samples == key] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    # Pillow has no direct way from premultiplied grey to RGBA.
    picture = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def pixels_of_values(values: NDArray[np.float32], config: PreprocessorConfig) -> Pixels:
    """The encoder's pixels of an image that the checkpoint's own image processor has prepared.

    The processor computes (pixel * rescale_factor - image_mean) / image_std, for whole pixels of 0
    to 255; this finds them again, exactly. It also does where its values were rounded to half
    precision.

    Args:
        values: float32 [3, height, width].
        config: the checkpoint's image processor.

    Returns:
        uint8 [3, height, width].

    Raises:
        InvalidPixelValuesError: if the size is another than the processor's, or the values are
            none that it makes.
    """
    if values.ndim != 3 or values.shape[0] != 3 or values.shape[1:] != config.output_size():
        raise InvalidPixelValuesError(
            f"pixel values must have the shape {(3, *(config.output_size() or ()))}, "
            f"have {values.shape}"
        )
    if not np.isfinite(values).all():
        raise InvalidPixelValuesError("the pixel values must be finite, have infinity or NaN")
    pixels, rounded = values.astype(np.float64), np.abs(values) * _share_rounded_off(values)
    if config.do_normalize:
        std, mean = np.array(config.image_std), np.array(config.image_mean)
        pixels = pixels * std[:, None, None] + mean[:, None, None]
        rounded = rounded * std[:, None, None]
    if config.do_rescale:
        pixels, rounded = pixels / config.rescale_factor, rounded / config.rescale_factor
    whole = np.rint(pixels)
    near = (np.abs(pixels - whole) <= _NEAR_A_PIXEL + rounded) & (whole >= 0) & (whole <= 255)
    if not near.all():
        raise InvalidPixelValuesError(
            "the pixel values are not what the checkpoint's image processor makes of an image"
        )
    return whole.astype(np.uint8)


def _share_rounded_off(values: NDArray[np.float32]) -> float:
    """What rounding may have changed of values that bfloat16 can hold: nearly half a pixel."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return 0.0 if (bits & _BITS_BELOW_BFLOAT16).any() else _BFLOAT16_SHARE


def to_pixels(
    image: Image.Image, config: PreprocessorConfig, resize: Resize = "checkpoint"
) -> Pixels:
    """Resize and crop an RGB picture; uint8 [3, height, width]."""
    if config.do_resize or resize != "checkpoint":
        height, width = _resized_size(*image.size, config, resize)
        image = image.resize((width, height), resample=Image.Resampling(config.resample))
    if resize == "letterbox":
        image = _letterbox(image, config)
    pixels = np.moveaxis(np.asarray(image), -1, 0)
    if resize == "center_crop":
        pixels = _center_crop(pixels, *config.encoder_size())
    elif resize == "checkpoint" and config.do_center_crop:
        pixels = _center_crop(pixels, config.crop_height, config.crop_width)
    return np.ascontiguousarray(pixels)


def _resized_size(
    width: int, height: int, config: PreprocessorConfig, resize: Resize
) -> tuple[int, int]:
    """The height and width of a picture after resizing, before anything is cut off or added."""
    if resize == "center_crop":
        return _covering(width, height, config.encoder_size())
    if resize == "letterbox":
        return _fitting(width, height, config.encoder_size())
    if not config.do_resize:
        return height, width
    if config.height is not None and config.width is not None:
        return config.height, config.width
    assert config.shortest_edge is not None
    return _covering(width, height, (config.shortest_edge, config.shortest_edge))


def _covering(width: int, height: int, target: tuple[int, int]) -> tuple[int, int]:
    """The height and width of the smallest picture of the same aspect that covers a target."""
    to_height, to_width = target
    if to_width * height >= to_height * width:
        return int(to_width * height / width), to_width
    return to_height, int(to_height * width / height)


def _fitting(width: int, height: int, target: tuple[int, int]) -> tuple[int, int]:
    """The height and width of the largest picture of the same aspect that fits into a target."""
    to_height, to_width = target
    if to_width * height < to_height * width:
        return max(1, round(height / width * to_width)), to_width
    return to_height, max(1, round(width / height * to_height))


def _letterbox(image: Image.Image, config: PreprocessorConfig) -> Image.Image:
    """Put a picture into the middle of one of the encoder's size, of the colour that is 0 to it."""
    height, width = config.encoder_size()
    box = Image.new("RGB", (width, height), config.zero_colour())
    # Of an odd number of pixels to be added, one side gets one more: Pillow rounds to even.
    box.paste(image, (round((width - image.width) / 2), round((height - image.height) / 2)))
    return box


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
