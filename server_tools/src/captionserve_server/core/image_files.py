"""What an encoded image file is, and of its bytes those that make pixels.

Metadata are not pixels: a comment that cannot be read, a colour profile that is too large or a tag
that cannot be written back say nothing about the picture. So they are taken out before Pillow sees
the file, which reads some of them with errors of its own, or in quadratic time. Only what may hold
the orientation is kept aside.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    WebPImagePlugin,
)

from captionserve_server.core.errors import (
    ImageCorruptError,
    ImageTooManyPixelsError,
    UnsupportedImageFormatError,
)

# A large phone's photo.
MAX_PIXELS = 50_000_000
# Pillow's pictures of more than one band.
RGB_BYTES_PER_PIXEL = 4
# What is converted at once, so that it stays small beside the picture.
TILE_PIXELS = 1 << 18
_ORIENTATION_TAG = 0x0112
# How a picture is turned upright, by its orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What becomes of the turned picture's axes on the way back.
_EXCHANGING_SIDES = frozenset(_TURNS[orientation] for orientation in (5, 6, 7, 8))
_REVERSING_COLUMNS = frozenset(_TURNS[orientation] for orientation in (2, 3, 6, 7))
_REVERSING_ROWS = frozenset(_TURNS[orientation] for orientation in (3, 4, 7, 8))
# Text that may hold the orientation; more is of something else.
_MAX_TEXT_BYTES = 1 << 20
_BMP_HEADER_SIZES = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
# What may stand in a PNM header between two numbers, and how far a header is looked for.
_PNM_SPACE = re.compile(rb"(?:\s|#[^\r\n]*(?:[\r\n]|$))+")
_PNM_HEADER_BYTES = 4096
_PNM_COMMENT = re.compile(rb"#[^\r\n]*")
_SPACE = re.compile(rb"\s")
_NO_NUMBER = re.compile(rb"[^\d\s]")
_PLAIN_BLOCK_BYTES = 1 << 20
_JPEG_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xDA)})
_JPEG_START_OF_SCAN = 0xDA
_JPEG_APP0, _JPEG_APP1, _JPEG_APP14, _JPEG_APP15 = 0xE0, 0xE1, 0xEE, 0xEF
_JPEG_COMMENT = 0xFE
_PNG_XMP = b"XML:com.adobe.xmp"
_PNG_RAW_EXIF = b"Raw profile type exif"

# Two canvases of the decoder and its result.
_WEBP_BYTES_PER_PIXEL = 12
# The picture and its samples; or where it is transparent, and what takes that in.
_TWICE_BYTES_PER_PIXEL = 8

Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""
Metadata = dict[str, bytes | str]
"""What may hold the orientation, by the names under which Pillow looks for it."""
_Reader = Callable[[bytes], tuple[bytes, Metadata]]


@dataclass(frozen=True)
class _Format:
    """An accepted format.

    Attributes:
        name: Pillow's.
        is_one: whether bytes are, or were before they were damaged, a file of this format.
        plugin: Pillow's reader. Image.open, which finds one, warns by filters of the process.
        pixel_parts: takes metadata out.
    """

    name: str
    is_one: Callable[[bytes], bool]
    plugin: type[ImageFile.ImageFile]
    pixel_parts: _Reader = lambda encoded: (encoded, {})


class _WebPFile(WebPImagePlugin.WebPImageFile):
    """Frees the decoder's two canvases before Pillow makes a picture of what it gave."""

    def load_prepare(self) -> None:
        """Allocate the picture."""
        self._decoder = None
        super().load_prepare()


def open_image_file(encoded: bytes) -> ImageFile.ImageFile:
    """Read an image file's header.

    Args:
        encoded: a JPEG, PNG, WebP, BMP, GIF or PPM file.

    Returns:
        the picture, not yet decoded; its `info` has no metadata but the orientation's.

    Raises:
        ImageCorruptError: empty, truncated or damaged bytes.
        UnsupportedImageFormatError: bytes of another kind.
        ImageTooManyPixelsError: more than MAX_PIXELS.
    """
    if not encoded:
        raise ImageCorruptError("the image is empty")
    kind = next((each for each in _FORMATS if each.is_one(encoded)), None)
    if kind is None:
        raise UnsupportedImageFormatError(
            f"not an image of an accepted format: {', '.join(ACCEPTED_FORMATS)}"
        )
    try:
        pixel_parts, metadata = kind.pixel_parts(encoded)
        image = kind.plugin(io.BytesIO(pixel_parts))
        if kind.name == "PNG":
            _scale_colour_key(image, bit_depth=encoded[24])
        image.info.update(metadata)
    except Image.DecompressionBombError as error:  # Pillow's limit is above ours.
        raise ImageTooManyPixelsError(
            f"the image has more than {MAX_PIXELS} pixels, which is the most accepted"
        ) from error
    except Exception as error:  # A damaged header raises anything, like a damaged body.
        raise ImageCorruptError("the image is damaged or incomplete") from error
    check_size(*image.size)
    return image


def check_size(width: int, height: int) -> None:
    """Refuse a picture of too many pixels.

    Raises:
        ImageTooManyPixelsError: if it has more than MAX_PIXELS.
    """
    if width * height > MAX_PIXELS:
        raise ImageTooManyPixelsError(
            f"the image, {width} x {height}, has {width * height} pixels, "
            f"at most {MAX_PIXELS} are accepted"
        )


def load_image(image: ImageFile.ImageFile) -> Image.Image:
    """Decode what `open_image_file` gave; raises anything where it is damaged."""
    if image.tile and image.tile[0].args == "RGB;16B" and "transparency" in image.info:
        return _keyed_rgb_of_16_bits(image)
    # Pillow takes the samples of these one by one, in Python: half a minute for a large photo.
    if image.format == "PPM" and image.tile[0].codec_name == "ppm":
        return _scaled_pnm(image)
    if image.format == "PPM" and _is_plain(image):
        return _plain_pnm(image)
    image.load()
    return image


def tiles(width: int, height: int) -> Iterator[Box]:
    """Boxes of at most TILE_PIXELS that cover a picture."""
    columns = min(width, TILE_PIXELS)
    rows = TILE_PIXELS // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield left, top, min(left + columns, width), min(top + rows, height)


def orientation_turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright, by its metadata; None where it is, or none say so."""
    try:
        # Image's own: PngImageFile's decodes the picture first.
        orientation = Image.Image.getexif(image).get(_ORIENTATION_TAG)
    except Exception:  # Damaged metadata raise anything, and say nothing.
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def turned_size(size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    """Width and height of a picture after a turn."""
    return size[::-1] if turn in _EXCHANGING_SIDES else size


def source_box(box: Box, size: tuple[int, int], turn: Image.Transpose | None) -> Box:
    """Where in a picture lies what is in a box of it after a turn.

    Args:
        box: left, top, right and bottom, in the turned picture.
        size: width and height of the turned picture.
        turn: None for none.
    """
    left, top, right, bottom = box
    if turn in _REVERSING_COLUMNS:
        left, right = size[0] - right, size[0] - left
    if turn in _REVERSING_ROWS:
        top, bottom = size[1] - bottom, size[1] - top
    return (top, left, bottom, right) if turn in _EXCHANGING_SIDES else (left, top, right, bottom)


def decoding_bytes(image: Image.Image) -> int:
    """What Pillow holds at most while it decodes a file, the picture itself included.

    Args:
        image: as `open_image_file` gave it, or one that is decoded.
    """
    pixels = image.width * image.height
    if isinstance(image, _WebPFile):
        return _WEBP_BYTES_PER_PIXEL * pixels
    if image.format == "WEBP":
        return (_WEBP_BYTES_PER_PIXEL + RGB_BYTES_PER_PIXEL) * pixels
    if isinstance(image, JpegImagePlugin.JpegImageFile) and _has_many_scans(image):
        return RGB_BYTES_PER_PIXEL * pixels + _jpeg_coefficient_bytes(image)
    if _is_plain(image) or (image.mode == "RGB" and "transparency" in image.info):
        return _TWICE_BYTES_PER_PIXEL * pixels
    return RGB_BYTES_PER_PIXEL * pixels


def _has_many_scans(image: JpegImagePlugin.JpegImageFile) -> bool:
    """Whether libjpeg has to keep all coefficients until the last scan."""
    if not image.tile:
        return False
    assert isinstance(image.fp, io.BytesIO)
    encoded = image.fp.getvalue()
    for start, _, marker in _jpeg_segments(encoded):
        if marker == _JPEG_START_OF_SCAN:
            return "progressive" in image.info or encoded[start + 4] < image.layers
    return False


def _jpeg_coefficient_bytes(image: JpegImagePlugin.JpegImageFile) -> int:
    """Of 16 bits each, for whole blocks of 8 x 8 in each component's own resolution."""
    across = max(horizontal for _, horizontal, _, _ in image.layer)
    down = max(vertical for _, _, vertical, _ in image.layer)
    blocks = -(-image.width // (8 * across)) * -(-image.height // (8 * down))
    in_each = sum(horizontal * vertical for _, horizontal, vertical, _ in image.layer)
    return 2 * 64 * blocks * in_each


def _is_plain(image: Image.Image) -> bool:
    """Whether this is an opened PNM whose samples are numbers in ASCII; bits are quick to read."""
    if not isinstance(image, PpmImagePlugin.PpmImageFile) or not image.tile:
        return False
    return image.tile[0].codec_name == "ppm_plain" and image.mode != "1"


def _scale_colour_key(image: Image.Image, *, bit_depth: int) -> None:
    """Bring a grey PNG's transparent value, of 1, 2 or 4 bits, to the decoded samples' 8 bits."""
    key = image.info.get("transparency")
    if image.mode in {"1", "L"} and isinstance(key, int):
        largest = 2**bit_depth - 1
        image.info["transparency"] = (key & largest) * 255 // largest


def _keyed_rgb_of_16_bits(image: ImageFile.ImageFile) -> Image.Image:
    """Decode a PNG whose transparent colour has 16 bits a sample, of which Pillow keeps 8."""
    key: tuple[int, int, int] = image.info.pop("transparency")
    assert isinstance(image.fp, io.BytesIO)
    low = PngImagePlugin.PngImageFile(io.BytesIO(image.fp.getvalue()))
    # "L" for little endian: the same samples' other byte.
    low.tile = [low.tile[0]._replace(args="RGB;16L")]
    low.load()
    is_key = _equal_to(low, [sample & 255 for sample in key])
    low.close()
    image.load()
    is_key &= _equal_to(image, [sample >> 8 for sample in key])
    image.putalpha(Image.fromarray(np.where(is_key, np.uint8(0), np.uint8(255))))
    return image


def _equal_to(image: Image.Image, color: Sequence[int]) -> NDArray[np.bool_]:
    """Where an RGB picture has a colour; [height, width]."""
    equal = np.ones((image.height, image.width), np.bool_)
    for box in tiles(*image.size):
        left, top, right, bottom = box
        samples = np.asarray(image.crop(box))
        for band, sample in enumerate(color):
            equal[top:bottom, left:right] &= samples[:, :, band] == sample
    return equal


def _scaled_pnm(image: ImageFile.ImageFile) -> Image.Image:
    """Decode a binary PNM whose largest value is neither 255 nor 65535, as Pillow would."""
    tile = image.tile[0]
    assert isinstance(image.fp, io.BytesIO)
    assert isinstance(tile.args, tuple)
    largest: int = tile.args[-1]
    sample = np.dtype(np.uint8 if largest < 256 else ">u2")
    shape = (image.height, image.width, len(image.getbands()))
    samples = np.frombuffer(image.fp.getvalue(), sample, math.prod(shape), tile.offset)
    samples = samples.reshape(shape if image.mode == "RGB" else shape[:2])
    table = _table_to_8_bits(largest, 1 << 8 * sample.itemsize, grey=image.mode == "I")
    scaled = Image.new("RGB" if image.mode == "RGB" else "L", image.size)
    for left, top, right, bottom in tiles(*image.size):
        scaled.paste(Image.fromarray(table[samples[top:bottom, left:right]]), (left, top))
    return scaled


def _plain_pnm(image: ImageFile.ImageFile) -> Image.Image:
    """Decode a plain PNM of grey or RGB samples, as Pillow would.

    Raises:
        ValueError: if it holds anything but numbers and comments, or too few or too large ones.
    """
    tile = image.tile[0]
    assert isinstance(image.fp, io.BytesIO)
    assert isinstance(tile.args, tuple)
    largest: int = tile.args[-1]
    table = _table_to_8_bits(largest, largest + 1, grey=image.mode == "I")
    shape = (image.height, image.width) if image.mode != "RGB" else (image.height, image.width, 3)
    samples = np.empty(math.prod(shape), np.uint8)
    filled = 0
    for numbers in _numbers(image.fp.getvalue(), tile.offset):
        numbers = numbers[: samples.size - filled]
        if (numbers > largest).any():
            raise ValueError("a sample is larger than the largest one")
        samples[filled : filled + len(numbers)] = table[numbers]
        filled += len(numbers)
    if filled < samples.size:
        raise ValueError("too few samples")
    return Image.fromarray(samples.reshape(shape))


def _numbers(text: bytes, position: int) -> Iterator[NDArray[np.int64]]:
    """The numbers of a plain PNM from a position on, some at a time."""
    if text.find(b"#", position) >= 0:
        text, position = _PNM_COMMENT.sub(b"", text[position:]), 0
    while position < len(text):
        space = _SPACE.search(text, position + _PLAIN_BLOCK_BYTES)
        end = space.end() if space else len(text)
        block = text[position:end].strip()
        if _NO_NUMBER.search(block):
            raise ValueError("not a number")
        if block:
            yield np.fromstring(block, np.int64, sep=" ")
        position = end


def _table_to_8_bits(largest: int, count: int, *, grey: bool) -> NDArray[np.uint8]:
    """What each sample becomes; grey ones of 16 bits by way of a picture of 16 bits."""
    values = np.arange(count) / largest
    if grey:
        values = np.rint(values * 65535).clip(max=65535) / 65535
    table: NDArray[np.uint8] = np.rint(values * 255).clip(max=255).astype(np.uint8)
    return table


def _is_jpeg(encoded: bytes) -> bool:
    return encoded.startswith(b"\xff\xd8\xff")


def _is_png(encoded: bytes) -> bool:
    return encoded.startswith(b"\x89PNG")


def _is_webp(encoded: bytes) -> bool:
    # WAV and AVI are RIFF files, too.
    return encoded.startswith(b"RIFF") and b"WEBP".startswith(encoded[8:12])


def _is_bmp(encoded: bytes) -> bool:
    # A text may begin with BM; bytes 6 to 10 are reserved, and 0 by all who write the format.
    reserved, header_size = encoded[6:10], encoded[14:18]
    return encoded.startswith(b"BM") and (
        reserved == bytes(4) or int.from_bytes(header_size, "little") in _BMP_HEADER_SIZES
    )


def _is_gif(encoded: bytes) -> bool:
    return encoded.startswith(b"GIF8")


def _is_pnm(encoded: bytes) -> bool:
    """Whether this is P1 to P6 and then numbers; a text may begin with P5, a PFM holds floats."""
    if encoded[:2] not in {b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"}:
        return False
    header = encoded[2:_PNM_HEADER_BYTES]
    if not _PNM_SPACE.match(header):
        return False
    numbers = 2 if encoded[1:2] in b"14" else 3
    tokens = _PNM_SPACE.sub(b" ", header).split(maxsplit=numbers)[:numbers]
    return bool(tokens) and all(token.isdigit() for token in tokens)


def _jpeg_parts(encoded: bytes) -> tuple[bytes, Metadata]:
    """A JPEG without comments and application segments, but for those that tell its colours."""
    kept: list[bytes] = []
    exif: list[bytes] = []
    metadata: Metadata = {}
    position = 0
    for start, end, marker in _jpeg_segments(encoded):
        payload = encoded[start + 4 : end]
        if not _jpeg_segment_is_metadata(marker, payload):
            continue
        kept.append(encoded[position:start])
        position = end
        if marker == _JPEG_APP1 and payload.startswith(b"Exif\0\0"):
            exif.append(payload[6:])
        elif marker == _JPEG_APP1 and payload.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            metadata["xmp"] = payload.split(b"\0", 1)[1]
    if exif:
        metadata["exif"] = b"Exif\0\0" + b"".join(exif)
    return (b"".join([*kept, encoded[position:]]) if kept else encoded), metadata


def _jpeg_segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """Start, end and marker of each segment to the first scan's, as far as they are whole."""
    position = 2
    while position + 4 <= len(encoded) and encoded[position] == 0xFF:
        marker = encoded[position + 1]
        if marker == 0xFF:  # A byte to fill up with.
            position += 1
            continue
        if marker in _JPEG_BARE_MARKERS:
            position += 2
            continue
        end = position + 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
        if end < position + 4 or end > len(encoded):
            return
        yield position, end, marker
        if marker == _JPEG_START_OF_SCAN:
            return
        position = end


def _jpeg_segment_is_metadata(marker: int, payload: bytes) -> bool:
    # libjpeg takes the colour space from these two, where they are long enough.
    if marker == _JPEG_APP0:
        return not (payload.startswith(b"JFIF\0") and len(payload) >= 14)
    if marker == _JPEG_APP14:
        return not (payload.startswith(b"Adobe") and len(payload) >= 12)
    return marker == _JPEG_COMMENT or _JPEG_APP0 <= marker <= _JPEG_APP15


def _png_parts(encoded: bytes) -> tuple[bytes, Metadata]:
    """A PNG with its critical chunks and tRNS alone; an animated one's first picture."""
    kept = []
    metadata: Metadata = {}
    # Where the bytes begin that have neither been kept nor dropped.
    position = 0
    for start, end in _png_chunks(encoded):
        kind = encoded[start + 4 : start + 8]
        # A lower-case first letter: a picture can be shown without the chunk.
        if kind[0] & 0x20 and kind != b"tRNS":
            kept.append(encoded[position:start])
            position = end
            # Damaged metadata say nothing.
            with contextlib.suppress(ValueError, zlib.error):
                metadata |= _png_metadata(kind, encoded[start + 8 : end - 4])
    return (b"".join([*kept, encoded[position:]]) if kept else encoded), metadata


def _png_chunks(encoded: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each chunk, as far as they are whole."""
    position = 8
    while position + 12 <= len(encoded):
        (length,) = struct.unpack_from(">I", encoded, position)
        end = position + 12 + length
        if end > len(encoded):
            return
        yield position, end
        position = end


def _png_metadata(kind: bytes, data: bytes) -> Metadata:
    """What of a chunk may hold the orientation.

    Raises:
        ValueError: if the chunk is damaged.
        zlib.error: if its compressed text is.
    """
    if kind == b"eXIf":
        return {"exif": b"Exif\0\0" + data}
    keyword, _, rest = data.partition(b"\0")
    if keyword == _PNG_XMP and kind == b"iTXt":
        _, _, text = rest[2:].split(b"\0", 2)
        return {"xmp": _inflated(text) if rest[:1] == b"\1" else text}
    if keyword == _PNG_RAW_EXIF and kind in {b"tEXt", b"zTXt"}:
        text = _inflated(rest[1:]) if kind == b"zTXt" else rest
        return {_PNG_RAW_EXIF.decode(): text.decode("latin-1")}
    return {}


def _inflated(text: bytes) -> bytes:
    return zlib.decompressobj().decompress(text, _MAX_TEXT_BYTES)


_FORMATS = (
    _Format("JPEG", _is_jpeg, JpegImagePlugin.JpegImageFile, _jpeg_parts),
    _Format("PNG", _is_png, PngImagePlugin.PngImageFile, _png_parts),
    _Format("WEBP", _is_webp, _WebPFile),
    _Format("BMP", _is_bmp, BmpImagePlugin.BmpImageFile),
    _Format("GIF", _is_gif, GifImagePlugin.GifImageFile),
    _Format("PPM", _is_pnm, PpmImagePlugin.PpmImageFile),
)
# An allow-list: Pillow's other readers run Ghostscript (EPS) or parse what no photo needs.
ACCEPTED_FORMATS = tuple(each.name for each in _FORMATS)
