"""Our preprocessing against transformers' PIL image processors, pixel by pixel."""

from __future__ import annotations

import io
from typing import Any

import hypothesis
import numpy as np
import pytest
from captionserve_server.core.framing import Framing
from captionserve_server.core.preprocessing import preprocess, read_preprocessor_config
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.reference import picture

SIZES = [(224, 224), (640, 480), (333, 1000), (1, 300), (57, 31), (1600, 1200)]

PROCESSORS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ViT defaults": (ViTImageProcessorPil, {"image_processor_type": "ViTImageProcessor"}),
    "nlpconnect's file": (
        ViTImageProcessorPil,
        {
            "feature_extractor_type": "ViTFeatureExtractor",
            "do_normalize": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "resample": 2,
            "size": 224,
        },
    ),
    "bicubic to another shape": (
        ViTImageProcessorPil,
        {
            "image_processor_type": "ViTImageProcessorFast",
            "resample": 3,
            "size": {"height": 48, "width": 96},
        },
    ),
    "DeiT defaults": (DeiTImageProcessorPil, {"image_processor_type": "DeiTImageProcessor"}),
    "short edge, odd crop": (
        DeiTImageProcessorPil,
        {
            "image_processor_type": "DeiTImageProcessor",
            "size": {"shortest_edge": 65},
            "crop_size": {"height": 61, "width": 50},
        },
    ),
    "crop larger than the image": (
        DeiTImageProcessorPil,
        {
            "image_processor_type": "DeiTImageProcessor",
            "size": {"height": 40, "width": 41},
            "crop_size": 64,
        },
    ),
    "no resize": (
        DeiTImageProcessorPil,
        {"image_processor_type": "DeiTFeatureExtractor", "do_resize": False, "crop_size": 33},
    ),
}


def encoded(image: Image.Image, format_name: str, **options: Any) -> bytes:
    """The image as a file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def transformers_pixels(
    processor_type: type[Any], settings: dict[str, Any], image: Image.Image
) -> NDArray[np.uint8]:
    """What the image processor makes of an RGB picture before rescaling; [3, height, width]."""
    processor = processor_type(**settings)
    made = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    pixels: NDArray[np.uint8] = made["pixel_values"][0]
    return pixels


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_equal_transformers(name: str, size: tuple[int, int]) -> None:
    processor_type, settings = PROCESSORS[name]
    image = picture(seed=size[0], width=size[0], height=size[1])

    pixels = preprocess(encoded(image, "PNG"), read_preprocessor_config(settings)).whole

    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, image))


@pytest.mark.parametrize(
    ("format_name", "options"),
    [
        ("JPEG", {"quality": 80}),
        ("JPEG", {"quality": 95, "progressive": True, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"quality": 70}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("PPM", {}),
    ],
)
def test_formats_equal_transformers_on_the_decoded_file(
    format_name: str, options: dict[str, Any]
) -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    content = encoded(picture(seed=1, width=320, height=200), format_name, **options)
    decoded = Image.open(io.BytesIO(content)).convert("RGB")

    pixels = preprocess(content, read_preprocessor_config(settings)).whole

    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, decoded))


def test_transparency_is_what_transformers_composites() -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    image = picture(seed=2)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    expected = processor_type(**settings)(
        image, do_convert_rgb=True, do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]

    pixels = preprocess(encoded(image, "PNG"), read_preprocessor_config(settings)).whole

    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_other_modes_equal_transformers_on_their_rgb_form(mode: str) -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    format_name = "JPEG" if mode == "CMYK" else "PNG"
    content = encoded(picture(seed=3, width=200, height=150).convert(mode), format_name)
    decoded = Image.open(io.BytesIO(content)).convert("RGB")

    pixels = preprocess(content, read_preprocessor_config(settings)).whole

    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, decoded))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_first(orientation: int) -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(seed=4, width=120, height=80), "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")

    pixels = preprocess(content, read_preprocessor_config(settings)).whole

    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, upright))


WIDE = {
    "image_processor_type": "ViTImageProcessor",
    "resample": 3,
    "size": {"height": 48, "width": 96},
    "image_mean": [0.485, 0.456, 0.406],
}
FRAMED = {name: PROCESSORS[name][1] for name in ("ViT defaults", "DeiT defaults")} | {"wide": WIDE}
# Odd differences and pictures that fit already among them.
FRAMED_SIZES = [*SIZES, (100, 225), (225, 100), (448, 448), (48, 24), (1000, 1001)]


@pytest.mark.parametrize("size", FRAMED_SIZES)
@pytest.mark.parametrize("name", ["ViT defaults", "DeiT defaults"])
def test_center_crop_is_what_transformers_processors_do(name: str, size: tuple[int, int]) -> None:
    config = read_preprocessor_config(FRAMED[name])
    image = picture(seed=size[1], width=size[0], height=size[1])
    views = preprocess(encoded(image, "PNG"), config, framing=Framing(resize="center_crop"))

    for processor_type in (DeiTImageProcessorPil, CLIPImageProcessorPil):
        settings = {
            "size": {"shortest_edge": 224},
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "resample": config.resample,
        }
        np.testing.assert_array_equal(
            views.whole, transformers_pixels(processor_type, settings, image)
        )


@pytest.mark.parametrize("size", FRAMED_SIZES)
@pytest.mark.parametrize("name", FRAMED)
def test_letterbox_is_what_pillow_pads(name: str, size: tuple[int, int]) -> None:
    config = read_preprocessor_config(FRAMED[name])
    image = picture(seed=size[1], width=size[0], height=size[1])
    views = preprocess(encoded(image, "PNG"), config, framing=Framing(resize="letterbox"))

    height, width = config.encoder_size()
    mean = np.array(config.image_mean)
    colour: Any = tuple(np.round(255 * mean).astype(int).tolist())
    if name == "wide" and size == (1, 300):
        # Of which Pillow leaves nothing, for 300 rows become 48 and less than half a column.
        line = image.resize((1, height), Image.Resampling(config.resample))
        padded = Image.new("RGB", (width, height), colour)
        padded.paste(line, (48, 0))
    else:
        padded = ImageOps.pad(image, (width, height), Image.Resampling(config.resample), colour)
    np.testing.assert_array_equal(views.whole, np.moveaxis(np.asarray(padded), -1, 0))
    # What was added is as near to 0 as whole pixels allow, once it is normalised.
    corner = views.whole[:, -1, -1]
    if size in {(333, 1000), (1, 300)}:
        assert np.abs(corner / 255 - mean).max() <= 0.5 / 255 + 1e-9


def test_center_crop_of_another_shape_keeps_the_middle() -> None:
    config = read_preprocessor_config(WIDE)
    for size, kept in (((200, 100), None), ((200, 300), (0, 100, 200, 200))):
        image = picture(seed=7, width=size[0], height=size[1])
        views = preprocess(encoded(image, "PNG"), config, framing=Framing(resize="center_crop"))
        assert views.whole.shape == (3, 48, 96)
        middle = image if kept is None else image.crop(kept)
        near = np.moveaxis(np.asarray(middle.resize((96, 48), Image.Resampling.BICUBIC)), -1, 0)
        # Cut before it is resized the same picture has other edges.
        assert np.abs(views.whole[:, 4:-4, 4:-4].astype(int) - near[:, 4:-4, 4:-4]).mean() < 2


def photo(seed: int, orientation: int) -> bytes:
    """A JPEG of 97 x 61 whose metadata say how it is turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(seed, 97, 61), "JPEG", quality=60, exif=exif)


RESIZES = st.sampled_from(["checkpoint", "center_crop", "letterbox"])
# Edges as shares of the sides.
BOXES = st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=4)


@hypothesis.settings(max_examples=150, deadline=None)
@given(
    orientation=st.integers(1, 8),
    shares=BOXES,
    resize=RESIZES,
    name=st.sampled_from(sorted(FRAMED)),
)
def test_a_part_is_what_a_file_of_its_pixels_would_be(
    orientation: int, shares: list[tuple[float, ...]], resize: Any, name: str
) -> None:
    config = read_preprocessor_config(FRAMED[name])
    content = photo(seed=2, orientation=orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    boxes = [box_of(each, *upright.size) for each in shares]

    views = preprocess(content, config, framing=Framing(tuple(boxes), (1, 2), resize))

    alone = Framing(resize=resize)
    assert views.boxes[:-2] == tuple(boxes)
    np.testing.assert_array_equal(views.whole, preprocess(content, config, framing=alone).whole)
    for box, pixels in zip(views.boxes, views.pixels[1:], strict=True):
        cut = encoded(upright.crop(box), "PNG")
        np.testing.assert_array_equal(pixels, preprocess(cut, config, framing=alone).whole)


def box_of(shares: tuple[float, ...], width: int, height: int) -> tuple[int, int, int, int]:
    """A box with an area within a picture."""
    left, right = sorted(round(share * (width - 1)) for share in shares[:2])
    top, bottom = sorted(round(share * (height - 1)) for share in shares[2:])
    return left, top, right + 1, bottom + 1


def test_sixteen_bit_samples_are_rescaled() -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    samples = np.linspace(0, 65535, 100 * 80).reshape(80, 100).astype(np.uint16)
    eight_bit = Image.fromarray((samples / 257).round().astype(np.uint8)).convert("RGB")

    pixels = preprocess(
        encoded(Image.fromarray(samples), "PNG"), read_preprocessor_config(settings)
    ).whole

    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, eight_bit))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    frames = [picture(seed).convert("P") for seed in (5, 6)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])

    pixels = preprocess(content, read_preprocessor_config(settings)).whole

    first = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, first))


SIZES_WRITTEN = (
    st.integers(1, 60)
    | st.lists(st.integers(1, 60), min_size=2, max_size=2)
    | st.fixed_dictionaries({"height": st.integers(1, 60), "width": st.integers(1, 60)})
)
FLAG = st.sampled_from([True, False, None])
PER_CHANNEL = st.floats(0.1, 0.9) | st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3)
VIT = {"image_processor_type": "ViTImageProcessor"}
SETTINGS = st.fixed_dictionaries(
    {"image_processor_type": st.just("ViTImageProcessor")},
    optional={
        "size": SIZES_WRITTEN | st.fixed_dictionaries({"shortest_edge": st.integers(1, 60)}),
        "default_to_square": st.booleans(),
        "resample": st.sampled_from([0, 1, 2, 3, 4, 5, "bicubic", "LANCZOS", None]),
        "do_resize": FLAG,
        "do_rescale": FLAG,
        "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 1]),
        "do_normalize": FLAG,
        "image_mean": PER_CHANNEL | st.lists(st.floats(0.1, 0.9), min_size=1, max_size=1),
        "image_std": PER_CHANNEL | st.lists(st.floats(0.1, 0.9), min_size=1, max_size=1),
    },
) | st.fixed_dictionaries(
    {
        "image_processor_type": st.just("ViTImageProcessor"),
        "do_center_crop": FLAG,
        "crop_size": SIZES_WRITTEN,
    }
)


@given(settings=SETTINGS, width=st.integers(20, 90), height=st.integers(20, 90))
@hypothesis.example(settings={**VIT, "resample": None}, width=20, height=20)
@hypothesis.example(settings={**VIT, "resample": None, "do_resize": False}, width=20, height=20)
@hypothesis.example(settings={**VIT, "size": None}, width=20, height=20)
@hypothesis.example(settings={**VIT, "image_mean": None}, width=20, height=20)
@hypothesis.settings(max_examples=150, deadline=None)
def test_settings_are_read_as_transformers_reads_them(
    settings: dict[str, Any], width: int, height: int
) -> None:
    image = picture(seed=width, width=width, height=height)
    # Its PIL twin fails where transformers' own default takes one element for every channel.
    whole = {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in settings.items()
    }
    processor = ViTImageProcessorPil(**whole)
    try:
        expected = processor(image, return_tensors="np")["pixel_values"][0]
    except ValueError:
        # What transformers refuses at an image is refused when the settings are read.
        with pytest.raises(ValueError, match=r"resample|size|mean|std"):
            read_preprocessor_config(settings)
        return

    config = read_preprocessor_config(settings)
    values = preprocess(encoded(image, "PNG"), config).whole.astype(np.float64)
    if config.do_rescale:
        values *= config.rescale_factor
    if config.do_normalize:
        mean, std = (np.reshape(each, (3, 1, 1)) for each in (config.image_mean, config.image_std))
        values = (values - mean) / std

    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-4)
