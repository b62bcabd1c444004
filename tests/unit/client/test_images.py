"""Every kind of image becomes the right bytes, without losing anything."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from captionserve._images import ImageInput, each_image, encode_image, image_message
from captionserve_server.core.preprocessing import PreprocessorConfig
from captionserve_server.local.images import image_views
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tests.pictures import BAD_TAG_EXIF

CONFIG = PreprocessorConfig()
FILE = b"any bytes: the client does not look into files"


class OddPath:
    """A path that is no str and no pathlib.Path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def decoded(encoded: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=["PPM", "PNG"])
    image.load()
    return image


def random_pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", [str, Path, OddPath])
def test_paths_are_read(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(FILE)
    assert encode_image(kind(path)) == FILE


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_bytes_and_file_objects_pass_through(kind: type) -> None:
    assert encode_image(kind(FILE)) == FILE


def test_an_opened_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(FILE)
    with path.open("rb") as file:
        assert encode_image(file) == FILE


def test_an_array_becomes_a_lossless_ppm() -> None:
    pixels = random_pixels(5, 4, 3)
    encoded = encode_image(pixels)
    assert encoded.startswith(b"P6\n4 5\n255\n")
    assert np.array_equal(np.asarray(decoded(encoded)), pixels)


def test_a_strided_array_keeps_its_picture() -> None:
    pixels = random_pixels(6, 8, 3)[::2, ::-1]
    assert np.array_equal(np.asarray(decoded(encode_image(pixels))), pixels)


def test_an_rgb_image_becomes_a_lossless_ppm() -> None:
    pixels = random_pixels(5, 4, 3)
    encoded = encode_image(Image.fromarray(pixels))
    assert encoded.startswith(b"P6")
    assert np.array_equal(np.asarray(decoded(encoded)), pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_modes_that_png_has_are_kept(mode: str) -> None:
    image = Image.fromarray(random_pixels(5, 4, 4), "RGBA").convert("RGB").convert(mode)
    result = decoded(encode_image(image))
    assert result.mode == mode
    assert np.array_equal(np.asarray(result.convert("RGBA")), np.asarray(image.convert("RGBA")))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_other_colour_modes_are_converted_as_pillow_does(mode: str) -> None:
    image = Image.frombytes(
        mode, (4, 5), random_pixels(5, 4, len(Image.new(mode, (1, 1)).getbands()))
    )
    result = decoded(encode_image(image))
    assert np.array_equal(np.asarray(result), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["PA", "RGBa"])
def test_other_alpha_modes_keep_their_transparency(mode: str) -> None:
    image = Image.new(mode, (4, 5))
    result = decoded(encode_image(image))
    assert np.array_equal(np.asarray(result), np.asarray(image.convert("RGBA")))


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B"])
def test_16_bit_samples_are_kept(mode: str) -> None:
    image = Image.new(mode, (4, 5), 40_000)
    assert decoded(encode_image(image)).getpixel((0, 0)) == 40_000


@pytest.mark.parametrize(("value", "kept"), [(-5, 0), (70_000, 65_535)])
def test_32_bit_samples_are_held_to_16_bits(value: int, kept: int) -> None:
    assert decoded(encode_image(Image.new("I", (2, 2), value))).getpixel((0, 0)) == kept


def test_a_palette_keeps_its_transparent_colour() -> None:
    image = Image.new("P", (4, 5))
    image.info["transparency"] = 0
    assert decoded(encode_image(image)).info["transparency"] == 0


def test_rgb_with_a_transparent_colour_keeps_it() -> None:
    image = Image.new("RGB", (4, 5))
    image.info["transparency"] = (0, 0, 0)
    assert decoded(encode_image(image)).info["transparency"] == (0, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pillow_image_is_turned_upright_as_its_file_would_be(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(random_pixels(5, 4, 3)).save(file, "PNG", exif=exif)
    image = Image.open(file)
    image.load()
    turned = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(decoded(encode_image(image))), turned)


@pytest.mark.parametrize(
    ("exif", "size"),
    [(b"Exif\0\0garbage", (4, 5)), (BAD_TAG_EXIF, (5, 4))],
    ids=["no EXIF", "bad tag"],
)
def test_metadata_fail_no_pillow_image(exif: bytes, size: tuple[int, int]) -> None:
    image = Image.fromarray(random_pixels(5, 4, 3))
    image.info["exif"] = exif
    assert decoded(encode_image(image)).size == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_that_pillow_has_not_read_is_sent_as_it_is(kind: str) -> None:
    file = io.BytesIO()
    Image.fromarray(random_pixels(50, 40, 3)).save(file, kind)
    image = Image.open(file)
    assert encode_image(image) == file.getvalue()
    # It can still be read.
    pixels = np.asarray(image)
    assert np.array_equal(np.asarray(decoded(encode_image(image))), pixels)


def test_another_picture_of_a_file_is_sent_as_it_is_read() -> None:
    first, second = (Image.new("RGB", (4, 5), color) for color in ("red", "blue"))
    file = io.BytesIO()
    first.save(file, "PNG", save_all=True, append_images=[second])
    image = Image.open(file)
    image.seek(1)
    assert decoded(encode_image(image)).getpixel((0, 0)) == (0, 0, 255)


def test_a_draft_is_sent_as_it_is_read() -> None:
    file = io.BytesIO()
    Image.fromarray(random_pixels(64, 64, 3)).save(file, "JPEG")
    image = Image.open(file)
    image.draft("RGB", (16, 16))
    assert decoded(encode_image(image)).size == (16, 16)


@pytest.mark.parametrize("value", [None, 7, ["photo.jpg"], object()])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="an image must be a path, bytes"):
        encode_image(value)  # type: ignore[arg-type]


def test_a_text_file_object_is_refused() -> None:
    with pytest.raises(TypeError, match="binary mode"):
        encode_image(io.StringIO("text"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 4), np.uint8),
        np.zeros((5, 4, 4), np.uint8),
        np.zeros((3, 5, 4), np.uint8),
        np.zeros((1, 5, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((5, 4, 3), np.float32),
    ],
)
def test_other_arrays_are_refused(array: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"uint8 of shape \(height, width, 3\)"):
        encode_image(array)


@pytest.mark.parametrize("mode", ["F", "La", "I;16L"])
def test_modes_without_a_right_answer_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode {mode} must be converted to RGB first"):
        encode_image(Image.new(mode, (4, 5)))


def test_an_image_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="must have pixels"):
        encode_image(Image.new("RGB", (0, 5)))


def test_a_missing_file_is_reported_as_python_does(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        encode_image(tmp_path / "missing.jpg")


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
def test_floats_are_sent_as_pixel_values(dtype: str) -> None:
    values = np.random.default_rng(7).normal(size=(3, 5, 4)).astype(dtype)
    message = image_message(values)
    assert message.WhichOneof("content") == "pixel_values"
    sent = message.pixel_values
    assert (sent.height, sent.width) == (5, 4)
    received = np.frombuffer(sent.values, "<f4").reshape(3, 5, 4)
    assert np.array_equal(received, values.astype("<f4"))


def test_a_tensor_with_gradients_is_sent_as_its_values() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(24.0).reshape(3, 2, 4).transpose(1, 2).requires_grad_()
    sent = image_message(tensor).pixel_values
    assert (sent.height, sent.width) == (4, 2)
    assert np.array_equal(
        np.frombuffer(sent.values, "<f4").reshape(3, 4, 2), tensor.detach().numpy()
    )


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
def test_a_tensor_of_any_precision_is_sent_as_float32(kind: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.linspace(-2, 2, 24, dtype=getattr(torch, kind)).reshape(2, 4, 3).permute(2, 0, 1)
    assert not tensor.is_contiguous()
    sent = image_message(tensor).pixel_values
    received = np.frombuffer(sent.values, "<f4").reshape(3, 2, 4)
    assert np.array_equal(received, tensor.float().numpy())


def test_a_batch_is_several_images_where_several_are_taken() -> None:
    torch = pytest.importorskip("torch")
    batch = np.arange(72, dtype=np.float32).reshape(2, 3, 3, 4)
    images = list(each_image([FILE, batch, torch.tensor(batch), batch[0], np.zeros((0, 3, 4, 4))]))
    assert images[0] == FILE
    assert [image_message(each) for each in images[1:]] == [
        image_message(each) for each in (*batch, *batch, batch[0])
    ]
    assert [image_message(each) for each in each_image(cast(Any, batch))] == [
        image_message(each) for each in batch
    ]


def test_a_batch_is_no_single_image() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 5, 4\) is several images: caption_many takes"):
        image_message(np.zeros((1, 3, 5, 4), np.float32))


@pytest.mark.parametrize("shape", [(5, 4, 3), (3, 5), (1, 1, 3, 5, 4), (3, 0, 4)])
def test_floats_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(3, height, width\)"):
        image_message(np.zeros(shape, np.float32))


def test_other_images_are_sent_as_files() -> None:
    assert image_message(FILE).encoded == FILE
    assert image_message(random_pixels(5, 4, 3)).encoded.startswith(b"P6")


@pytest.mark.parametrize("made", [lambda pixels: pixels, Image.fromarray], ids=["array", "PIL"])
def test_a_large_photo_is_compressed_without_loss(
    made: Callable[[NDArray[np.uint8]], ImageInput],
) -> None:
    # Six megapixels with the noise of a dim room; the rows are no whole number of blocks.
    rows, columns = np.mgrid[:3001, :2000]
    noise = np.random.default_rng(3).normal(scale=6, size=(3001, 2000))
    smooth = np.stack([rows // 15, columns // 10, (rows + columns) // 25], 2)
    pixels = (smooth + noise[:, :, None] + 30).clip(0, 255).astype(np.uint8)
    encoded = encode_image(made(pixels))
    # So 24 megapixels, 72 MB, fit into a message of 64 MiB.
    assert len(encoded) < 0.8 * pixels.nbytes
    assert np.array_equal(np.asarray(decoded(encoded)), pixels)


@pytest.mark.parametrize("read", [encode_image, lambda path: image_views(path, CONFIG)])
@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("https://example.org/photo.jpg", "a URL"),
        ("s3://bucket/photo.jpg", "a URL"),
        (Path("https://example.org/photo.jpg"), "a URL"),
        ("data:image/png;base64,iVBORw0KGgo=", "a data URI"),
        ("DATA:," + "x" * 100_000, "a data URI"),
        (base64.b64encode(bytes(range(256))).decode(), "base64 text"),
        (base64.encodebytes(bytes(5000)).decode(), "base64 text"),
    ],
)
def test_an_image_given_as_a_path_is_said_to_be_none(
    read: Callable[[str | Path], object], path: str | Path, what: str
) -> None:
    with pytest.raises(OSError, match=f"an image must be a path or its bytes, not {what}"):
        read(path)
