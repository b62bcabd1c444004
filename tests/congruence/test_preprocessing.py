"""Our preprocessing against transformers' PIL image processors, pixel by pixel."""

from __future__ import annotations

import io
from typing import Any

import hypothesis
import numpy as np
import pytest
from captionserve_server.core.preprocessing import preprocess, read_preprocessor_config
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
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

    pixels = preprocess(encoded(image, "PNG"), read_preprocessor_config(settings))

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

    pixels = preprocess(content, read_preprocessor_config(settings))

    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, decoded))


def test_transparency_is_what_transformers_composites() -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    image = picture(seed=2)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    expected = processor_type(**settings)(
        image, do_convert_rgb=True, do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]

    pixels = preprocess(encoded(image, "PNG"), read_preprocessor_config(settings))

    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_other_modes_equal_transformers_on_their_rgb_form(mode: str) -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    format_name = "JPEG" if mode == "CMYK" else "PNG"
    content = encoded(picture(seed=3, width=200, height=150).convert(mode), format_name)
    decoded = Image.open(io.BytesIO(content)).convert("RGB")

    pixels = preprocess(content, read_preprocessor_config(settings))

    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, decoded))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_first(orientation: int) -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(seed=4, width=120, height=80), "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")

    pixels = preprocess(content, read_preprocessor_config(settings))

    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, upright))


def test_sixteen_bit_samples_are_rescaled() -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    samples = np.linspace(0, 65535, 100 * 80).reshape(80, 100).astype(np.uint16)
    eight_bit = Image.fromarray((samples / 257).round().astype(np.uint8)).convert("RGB")

    pixels = preprocess(
        encoded(Image.fromarray(samples), "PNG"), read_preprocessor_config(settings)
    )

    np.testing.assert_array_equal(pixels, transformers_pixels(processor_type, settings, eight_bit))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    processor_type, settings = PROCESSORS["ViT defaults"]
    frames = [picture(seed).convert("P") for seed in (5, 6)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])

    pixels = preprocess(content, read_preprocessor_config(settings))

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
    values = preprocess(encoded(image, "PNG"), config).astype(np.float64)
    if config.do_rescale:
        values *= config.rescale_factor
    if config.do_normalize:
        mean, std = (np.reshape(each, (3, 1, 1)) for each in (config.image_mean, config.image_std))
        values = (values - mean) / std

    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-4)
