"""A part's captions are those of a file of its pixels, by the engine and by transformers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captionserve import GenerationOptions
from captionserve_server.core.engine.scheduler import SchedulerLimits
from captionserve_server.core.errors import (
    CaptionServeError,
    ImageCorruptError,
    InvalidFramingError,
)
from captionserve_server.core.framing import MAX_REGIONS, RESIZES
from captionserve_server.core.options import DecodingOptions
from captionserve_server.local import FinishedCaption, LocalCaptioner, LocalResult
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.congruence.test_preprocessing import box_of, photo
from tests.pictures import png
from tests.reference import picture, reference

NAMES = ("projected", "deit")
# Fewer slots than most questions have parts.
LIMITS = SchedulerLimits(slots=4)

Captioners = Callable[[str], LocalCaptioner]


@pytest.fixture(scope="module")
def captioner(model_repository: Callable[[str], Path]) -> Iterator[Captioners]:
    """Checkpoint name to its captioner in this process."""
    loaded: dict[str, LocalCaptioner] = {}
    with ExitStack() as stack:

        def load(name: str) -> LocalCaptioner:
            if name not in loaded:
                made = LocalCaptioner(model_repository(name), threads=1, limits=LIMITS)
                loaded[name] = stack.enter_context(made)
            return loaded[name]

        yield load


def tokens(captions: tuple[FinishedCaption, ...]) -> list[tuple[int, ...]]:
    return [caption.token_ids for caption in captions]


def upright_of(content: bytes) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(content)))


DECODING: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2, "max_length": 12},
    {"do_sample": True, "seed": 7, "top_k": 0, "temperature": 1.5, "max_length": 10},
    {"num_beams": 2, "force_words": ["at"], "max_length": 12},
    {"num_beams": 2, "prefix": "a", "output_attentions": True, "max_length": 10},
]
BOXES = st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    orientation=st.integers(1, 8),
    shares=BOXES,
    tiles=st.sampled_from([None, (1, 1), (2, 3)]),
    resize=st.sampled_from([None, "checkpoint", "center_crop", "letterbox"]),
    decoding=st.sampled_from(DECODING),
)
def test_a_parts_captions_are_those_of_a_file_of_its_pixels(
    captioner: Captioners,
    name: str,
    orientation: int,
    shares: list[tuple[float, ...]],
    tiles: tuple[int, int] | None,
    resize: Any,
    decoding: dict[str, Any],
) -> None:
    content = photo(seed=orientation, orientation=orientation)
    upright = upright_of(content)
    boxes = [box_of(each, *upright.size) for each in shares]

    result = captioner(name).caption(content, regions=boxes, tiles=tiles, resize=resize, **decoding)

    rows, columns = tiles or (0, 0)
    assert [region.box for region in result.regions][: len(boxes)] == boxes
    assert len(result.regions) == len(boxes) + rows * columns
    files = [content, *(png(upright.crop(region.box)) for region in result.regions)]
    alone = captioner(name).caption_all(files, resize=resize, **decoding)
    assert tokens(result.captions) == tokens(alone[0].captions)
    for region, own in zip(result.regions, alone[1:], strict=True):
        assert tokens(region.captions) == tokens(own.captions)
        assert region.text == own.text
        for found, expected in zip(region.captions, own.captions, strict=True):
            assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-4)
            assert found.confidence == pytest.approx(expected.confidence, abs=1e-4)
            if expected.attention is not None and found.attention is not None:
                np.testing.assert_allclose(found.attention, expected.attention, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 4, "num_return_sequences": 2}])
def test_a_parts_captions_are_transformers(
    options: dict[str, Any],
    captioner: Captioners,
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder("projected"))
    image = picture(3, width=90, height=70)
    boxes = [(0, 0, 90, 70), (10, 5, 60, 70), (89, 0, 90, 70), (33, 33, 34, 34)]
    result = captioner("projected").caption(image, regions=boxes, tiles=(2, 2), **options)
    for region in result.regions:
        expected = truth.captions(image.crop(region.box), DecodingOptions(**options))
        assert tokens(region.captions) == [each.token_ids for each in expected]
    assert tokens(result.regions[0].captions) == tokens(result.captions)


def kinds_of_images() -> list[Any]:
    image = picture(5, width=64, height=48)
    return [png(image), image, np.asarray(image), io.BytesIO(png(image)), image.convert("RGBA")]


def test_every_kind_of_image_has_parts(captioner: Captioners) -> None:
    asked: Any = {"regions": [(3, 4, 60, 40)], "tiles": (1, 2), "resize": "letterbox"}
    results = captioner("projected").caption_all(kinds_of_images(), **asked)
    assert len({str([tokens(region.captions) for region in each.regions]) for each in results}) == 1
    assert len(results[0].regions) == 3


def test_the_most_parts_there_may_be(captioner: Captioners) -> None:
    image = picture(6, width=64, height=64)
    result = captioner("projected").caption(image, tiles=(4, MAX_REGIONS // 4), num_beams=4)
    alone = [image.crop(region.box) for region in result.regions]
    expected = captioner("projected").caption_all(alone, num_beams=4)
    assert [region.text for region in result.regions] == [each.text for each in expected]


def test_asking_for_parts_changes_no_other_caption(captioner: Captioners) -> None:
    images = [picture(seed) for seed in range(4)]
    plain = captioner("projected").caption_all(images, num_beams=2)
    framed = captioner("projected").caption_all(images, tiles=(2, 2), num_beams=2)
    said = captioner("projected").caption_all(images, resize="checkpoint", num_beams=2)
    for results in (framed, said):
        assert [tokens(each.captions) for each in results] == [
            tokens(each.captions) for each in plain
        ]
    assert all(each.regions == () for each in (*plain, *said))


def test_another_way_of_resizing_is_another_caption(captioner: Captioners) -> None:
    wide = [picture(seed, width=120, height=40) for seed in range(8)]
    texts: dict[str, list[str]] = {}
    for resize in RESIZES:
        results = captioner("projected").caption_all(wide, resize=resize)
        texts[resize] = [result.text for result in results]
    # What is cut off is not seen.
    middles = [image.crop((40, 0, 80, 40)) for image in wide]
    assert texts["center_crop"] == [
        each.text for each in captioner("projected").caption_all(middles)
    ]
    assert len({tuple(each) for each in texts.values()}) == 3


@pytest.mark.parametrize(
    ("asked", "error", "fields"),
    [
        ({"regions": [(0, 0, 1, 1), (0, 0, 61, 1)]}, InvalidFramingError, {"regions[1]"}),
        ({"regions": [(0, 0, 0, 1)]}, InvalidFramingError, {"regions[0]"}),
        ({"tiles": (45, 0)}, InvalidFramingError, {"tiles"}),
        ({"resize": "squash"}, InvalidFramingError, {"resize"}),
    ],
)
def test_what_an_image_does_not_have_is_refused_by_field(
    asked: dict[str, Any],
    error: type[CaptionServeError],
    fields: set[str],
    captioner: Captioners,
) -> None:
    with pytest.raises(error) as refused:
        captioner("projected").caption(picture(1), GenerationOptions(num_beams=2), **asked)
    assert set(refused.value.field_violations) == fields


def test_one_image_without_such_a_part_ends_no_other(captioner: Captioners) -> None:
    images: list[Any] = [
        picture(1, width=60),
        picture(2, width=20),
        b"\xff\xd8\xff",
        picture(3, width=60),
    ]
    outcomes = list(captioner("projected").caption_each(images, regions=[(30, 0, 50, 20)]))
    assert [type(outcome) for outcome in outcomes] == [
        LocalResult,
        InvalidFramingError,
        ImageCorruptError,
        LocalResult,
    ]


def test_a_tensor_has_no_parts(captioner: Captioners) -> None:
    values = np.ones((3, 32, 32), np.float32)
    with pytest.raises(InvalidFramingError) as refused:
        captioner("projected").caption(values, regions=[(0, 0, 1, 1)], resize="center_crop")
    assert set(refused.value.field_violations) == {"regions", "resize"}
