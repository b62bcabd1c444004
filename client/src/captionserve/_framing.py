"""What is asked of an image besides its whole: parts to be described, and a way of resizing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal, TypedDict

import grpc

from captionserve._errors import CaptionError
from captionserve.v1 import caption_pb2

Resize = Literal["checkpoint", "center_crop", "letterbox"]
"""How a picture gets the size that the model reads: as the checkpoint does it; the shorter side
made to fit, and the middle of the longer one kept; or the longer side made to fit, and the shorter
one padded."""

_RESIZES: dict[str | None, caption_pb2.Resize.ValueType] = {
    None: caption_pb2.RESIZE_UNSPECIFIED,
    "checkpoint": caption_pb2.RESIZE_CHECKPOINT,
    "center_crop": caption_pb2.RESIZE_CENTER_CROP,
    "letterbox": caption_pb2.RESIZE_LETTERBOX,
}
_MOST_INT32 = 2**31 - 1


class Framing(TypedDict, total=False):
    """Arguments of every call that describes images; each may be left out, or None.

    Attributes:
        regions: parts to be described beside the whole, each left, top, right and bottom in pixels
            of the upright image; right and bottom are the column and the row after the last.
        tiles: rows and columns of a grid over the image, whose cells are described likewise, behind
            the regions, row by row.
        resize: how the image, and each part, gets the size that the model reads.
    """

    regions: Sequence[Sequence[int]] | None
    tiles: Sequence[int] | None
    resize: Resize | None


def set_framing(request: caption_pb2.CaptionRequest, framing: Framing) -> None:
    """Write what is asked for into a request.

    Raises:
        CaptionError: if something cannot be sent; INVALID_FRAMING with every field named, as the
            service answers to what an image does not have.
    """
    faults: dict[str, str] = {}
    regions = framing.get("regions")
    for number, given in enumerate(() if regions is None else regions):
        box = _whole_numbers(given, 4)
        if box is None:
            wanted = "must be four whole numbers of pixels: left, top, right, bottom"
            faults[f"regions[{number}]"] = wanted
        else:
            left, top, right, bottom = box
            request.regions.add(left=left, top=top, right=right, bottom=bottom)
    tiles = framing.get("tiles")
    if tiles is not None:
        grid = _whole_numbers(tiles, 2)
        if grid is None:
            faults["tiles"] = "must be two whole numbers above 0: rows and columns"
        else:
            request.tiles.rows, request.tiles.cols = grid
    resize = framing.get("resize")
    if resize in _RESIZES:
        request.resize = _RESIZES[resize]
    else:
        names = ", ".join(name for name in _RESIZES if name is not None)
        faults["resize"] = f"must be one of {names}"
    if faults:
        raise CaptionError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FRAMING",
            "; ".join(f"{field}: {fault}" for field, fault in faults.items()),
            faults,
        )


def _whole_numbers(values: object, count: int) -> tuple[int, ...] | None:
    """So many integers that can be sent; None where these are none. Arrays are taken as well."""
    to_list = getattr(values, "tolist", None)
    listed = values if to_list is None else to_list()
    if not isinstance(listed, (list, tuple)) or len(listed) != count:
        return None
    if any(isinstance(value, bool) for value in listed):
        return None
    try:
        numbers = tuple(map(operator.index, listed))
    except TypeError:
        return None
    return numbers if all(abs(number) <= _MOST_INT32 for number in numbers) else None
