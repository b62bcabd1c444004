"""The emoji art of the demo scenes, as RGBA tiles by style and object; tints are made here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from captionserve_server.demo.facts import TINT_HUES_DEGREES, ObjectFact
from captionserve_server.demo.kinds import TINTED_KINDS, code_point_of

_FOLDER = Path(__file__).parent / "art"
# Pixels this close to the art's main hue are recoloured; windows, wheels and strings keep theirs.
_HUE_REACH = 32 / 256
_MIN_SATURATION = 64 / 256


@dataclass(frozen=True)
class ArtIndex:
    """What the atlases hold; every style's atlas has the same order of tiles."""

    tile_size_pixels: int
    columns: int
    code_points: tuple[str, ...]
    styles: dict[str, str]


@cache
def art_index() -> ArtIndex:
    """Read the index that lies beside the atlases."""
    fields = json.loads((_FOLDER / "index.json").read_text(encoding="utf-8"))
    return ArtIndex(**{**fields, "code_points": tuple(fields["code_points"])})


@cache
def _atlas(style: str) -> Image.Image:
    with Image.open(_FOLDER / f"{style}.png") as image:
        atlas: Image.Image = image.convert("RGBA")
    return atlas


@cache
def tile_of(style: str, fact: ObjectFact) -> Image.Image:
    """Return the RGBA tile that shows this object in this style, tinted where its kind asks."""
    index = art_index()
    row, column = divmod(index.code_points.index(code_point_of(fact)), index.columns)
    size = index.tile_size_pixels
    left, top = column * size, row * size
    tile = _atlas(style).crop((left, top, left + size, top + size))
    if fact.kind in TINTED_KINDS and fact.colour is not None:
        return _tint(tile, TINT_HUES_DEGREES[fact.colour])
    return tile


def _tint(tile: Image.Image, hue_degrees: float) -> Image.Image:
    """Return the tile with its main hue turned to `hue_degrees`, other hues untouched."""
    alpha = tile.getchannel("A")
    hsv: npt.NDArray[np.uint8] = np.array(tile.convert("RGB").convert("HSV"))
    hue = hsv[..., 0] / 256
    saturated = (hsv[..., 1] / 256 > _MIN_SATURATION) & (np.asarray(alpha) > 0)
    main_hue = float(np.argmax(np.bincount(hsv[..., 0][saturated], minlength=256))) / 256
    distance = np.abs((hue - main_hue + 0.5) % 1 - 0.5)
    recoloured = saturated & (distance < _HUE_REACH)
    hsv[..., 0][recoloured] = round(hue_degrees / 360 * 255)
    tinted = Image.fromarray(hsv, "HSV").convert("RGB")
    tinted.putalpha(alpha)
    return tinted
