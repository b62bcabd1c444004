"""What of an image is captioned beside the whole, and how pictures get the encoder's size.

A request's regions and tiles are boxes in pixels of the upright image. Each is captioned as if it
were an image of its own: as a file of these pixels would be.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, cast, get_args

from captionserve_server.core.errors import InvalidFramingError
from captionserve_server.core.image_files import Box

Resize = Literal["checkpoint", "center_crop", "letterbox"]
"""How a picture gets the encoder's size; core/preprocessing.py has the formulas."""
RESIZES: tuple[Resize, ...] = get_args(Resize)
# Regions and tiles together. With the whole, a question takes half of the decoder's default slots.
MAX_REGIONS = 16


class NamedFraming(TypedDict, total=False):
    """A framing as arguments by name; what is left out, or None, is not asked for."""

    regions: Sequence[Sequence[int]] | None
    tiles: Sequence[int] | None
    resize: Resize | None


@dataclass(frozen=True)
class Framing:
    """What is asked of an image besides its whole.

    Attributes:
        regions: boxes with an area, none of which begins left of the image or above it.
        tiles: rows and columns of a grid over the image, whose cells follow the regions row by row;
            None for none.
        resize: of the whole and of each part.
    """

    regions: tuple[Box, ...] = ()
    tiles: tuple[int, int] | None = None
    resize: Resize = "checkpoint"

    @classmethod
    def of(
        cls,
        regions: Sequence[Sequence[int]] | None = None,
        tiles: Sequence[int] | None = None,
        resize: str | None = None,
    ) -> Framing:
        """What a caller asks for, as far as it can be checked without the image.

        Args:
            regions: left, top, right and bottom of each; None for none.
            tiles: rows and columns; None for none.
            resize: one of RESIZES; None for the checkpoint's way.

        Raises:
            InvalidFramingError: names every field at fault, such as regions[1].
        """
        faults: dict[str, str] = {}
        boxes = [_whole_numbers(box, 4) for box in (() if regions is None else regions)]
        for number, box in enumerate(boxes):
            fault = _fault_of_box(box)
            if fault is not None:
                faults[f"regions[{number}]"] = fault
        grid = None if tiles is None else _whole_numbers(tiles, 2)
        if tiles is not None and (grid is None or min(grid) < 1):
            faults["tiles"] = "must be two whole numbers above 0: rows and columns"
        elif len(boxes) + (0 if grid is None else grid[0] * grid[1]) > MAX_REGIONS:
            field = "regions" if grid is None else "tiles"
            faults[field] = f"an image has at most {MAX_REGIONS} regions and tiles together"
        if resize is not None and resize not in RESIZES:
            faults["resize"] = f"must be one of {', '.join(RESIZES)}"
        if faults:
            raise InvalidFramingError(faults)
        return cls(
            cast("tuple[Box, ...]", tuple(boxes)),
            cast("tuple[int, int] | None", grid),
            cast("Resize", resize or "checkpoint"),
        )

    @property
    def views(self) -> int:
        """How many pictures are captioned: the whole and its parts."""
        rows, columns = self.tiles or (0, 0)
        return 1 + len(self.regions) + rows * columns

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """The parts of an image, the regions first, then the tiles row by row.

        Args:
            width: in pixels, of the upright image.
            height: likewise.

        Raises:
            InvalidFramingError: if the image has no such parts; names every field at fault.
        """
        faults = {
            f"regions[{number}]": f"reaches beyond the image, which is {width} x {height}"
            for number, (_, _, right, bottom) in enumerate(self.regions)
            if right > width or bottom > height
        }
        rows, columns = self.tiles or (0, 0)
        if rows > height or columns > width:
            faults["tiles"] = f"are more than the image, {width} x {height}, has rows or columns"
        if faults:
            raise InvalidFramingError(faults)
        tiles = (
            (
                column * width // columns,
                row * height // rows,
                (column + 1) * width // columns,
                (row + 1) * height // rows,
            )
            for row in range(rows)
            for column in range(columns)
        )
        return (*self.regions, *tiles)

    def refuse_for_pixel_values(self) -> None:
        """Refuse what can be done with a picture only, not with the encoder's pixels.

        Raises:
            InvalidFramingError: if anything but the whole, in the checkpoint's way, is asked for.
        """
        asked = {
            "regions": bool(self.regions),
            "tiles": self.tiles is not None,
            "resize": self.resize != "checkpoint",
        }
        text = "needs the image itself: pixel values have been resized already"
        faults = {field: text for field, is_asked in asked.items() if is_asked}
        if faults:
            raise InvalidFramingError(faults)


WHOLE = Framing()
"""The whole image alone, resized in the checkpoint's way."""


def _whole_numbers(values: object, count: int) -> tuple[int, ...] | None:
    """So many integers; None where these are none. Arrays are taken as well."""
    to_list = getattr(values, "tolist", None)
    listed = values if to_list is None else to_list()
    if not isinstance(listed, (list, tuple)) or len(listed) != count:
        return None
    if any(isinstance(value, bool) for value in listed):
        return None
    try:
        return tuple(map(operator.index, listed))
    except TypeError:
        return None


def _fault_of_box(box: tuple[int, ...] | None) -> str | None:
    if box is None:
        return "must be four whole numbers of pixels: left, top, right, bottom"
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        return "has no area: right must be beyond left, and bottom beyond top"
    if left < 0 or top < 0:
        return "begins outside the image"
    return None
