"""What may be asked of an image, and which boxes that is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from captionserve_server.core.errors import InvalidFramingError
from captionserve_server.core.framing import MAX_REGIONS, WHOLE, Framing
from hypothesis import given
from hypothesis import strategies as st

BOX = (0, 0, 4, 3)


@pytest.mark.parametrize(
    ("asked", "fields"),
    [
        ({"regions": [BOX, (1, 1, 1, 2)]}, {"regions[1]"}),
        ({"regions": [(2, 0, 1, 2), BOX, (0, 2, 1, 2)]}, {"regions[0]", "regions[2]"}),
        ({"regions": [BOX, (-1, 0, 2, 2), (0, -1, 2, 2)]}, {"regions[1]", "regions[2]"}),
        ({"regions": [(0, 0, 1), (0, 0, 1, 1, 1)]}, {"regions[0]", "regions[1]"}),
        ({"regions": [(0, 0, 1, 1.0), BOX, "0011"]}, {"regions[0]", "regions[2]"}),
        ({"regions": [(0, 0, 1, True), None]}, {"regions[0]", "regions[1]"}),
        ({"regions": BOX}, {f"regions[{number}]" for number in range(4)}),
        ({"regions": [BOX] * (MAX_REGIONS + 1)}, {"regions"}),
        ({"tiles": (0, 2)}, {"tiles"}),
        ({"tiles": (2, -1)}, {"tiles"}),
        ({"tiles": (2,)}, {"tiles"}),
        ({"tiles": 4}, {"tiles"}),
        ({"tiles": (1, MAX_REGIONS + 1)}, {"tiles"}),
        ({"tiles": (2**31 - 1, 2**31 - 1)}, {"tiles"}),
        ({"regions": [BOX] * (MAX_REGIONS - 3), "tiles": (2, 2)}, {"tiles"}),
        ({"resize": "squash"}, {"resize"}),
        ({"resize": ""}, {"resize"}),
        (
            {"regions": [(1, 1, 1, 1)], "tiles": (0, 0), "resize": "x"},
            {"regions[0]", "tiles", "resize"},
        ),
    ],
)
def test_what_no_image_has_is_refused_by_field(asked: dict[str, Any], fields: set[str]) -> None:
    with pytest.raises(InvalidFramingError) as refused:
        Framing.of(**asked)
    violations = set(refused.value.field_violations)
    assert violations == fields
    assert all(f"{field}: " in refused.value.message for field in violations)


def test_nothing_asked_for_is_the_whole_in_the_checkpoints_way() -> None:
    assert Framing.of() == Framing.of([], None, None) == Framing.of(resize="checkpoint") == WHOLE
    assert WHOLE.views == 1
    assert WHOLE.boxes(5, 4) == ()


def test_arrays_are_lists_of_numbers() -> None:
    arrays: Any = np.array([BOX, (1, 2, 3, 4)]), np.array([2, 1])
    asked = Framing.of(*arrays)
    assert asked == Framing((BOX, (1, 2, 3, 4)), (2, 1))
    assert {type(edge) for box in asked.regions for edge in box} == {int}


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    regions=st.lists(st.just((0, 0, 1, 1)), max_size=MAX_REGIONS - 9),
)
def test_tiles_cover_every_pixel_once_and_differ_by_one(
    size: tuple[int, int], grid: tuple[int, int], regions: list[Any]
) -> None:
    width, height = size
    rows, columns = grid
    framing = Framing.of(regions, grid)
    if rows > height or columns > width:
        with pytest.raises(InvalidFramingError) as refused:
            framing.boxes(width, height)
        assert set(refused.value.field_violations) == {"tiles"}
        return
    boxes = framing.boxes(width, height)
    assert framing.views == 1 + len(boxes)
    own = boxes[len(regions) :]
    assert list(own) == sorted(own, key=lambda box: (box[1], box[0]))
    seen = np.zeros((height, width), int)
    for left, top, right, bottom in own:
        seen[top:bottom, left:right] += 1
    assert (seen == 1).all()
    for low, high in ((0, 2), (1, 3)):
        assert np.ptp([box[high] - box[low] for box in own]) <= 1


@pytest.mark.parametrize("box", [(0, 0, 6, 4), (0, 0, 5, 5), (5, 0, 6, 1), (9, 9, 2**31 - 1, 10)])
def test_a_box_beyond_the_image_is_refused_by_field(box: Any) -> None:
    with pytest.raises(InvalidFramingError, match="5 x 4") as refused:
        Framing.of([BOX, box, BOX]).boxes(5, 4)
    assert set(refused.value.field_violations) == {"regions[1]"}


def test_regions_come_before_tiles() -> None:
    framing = Framing.of([(1, 1, 3, 2), (0, 0, 5, 4)], (1, 2))
    assert framing.boxes(5, 4) == ((1, 1, 3, 2), (0, 0, 5, 4), (0, 0, 2, 4), (2, 0, 5, 4))


@pytest.mark.parametrize(
    ("asked", "fields"),
    [
        ({"regions": [BOX], "tiles": (1, 1)}, {"regions", "tiles"}),
        ({"resize": "letterbox"}, {"resize"}),
    ],
)
def test_pixel_values_have_neither_parts_nor_another_size(
    asked: dict[str, Any], fields: set[str]
) -> None:
    with pytest.raises(InvalidFramingError) as refused:
        Framing.of(**asked).refuse_for_pixel_values()
    assert set(refused.value.field_violations) == fields
    Framing.of(resize="checkpoint").refuse_for_pixel_values()
