"""Composes demo scenes: facts, layout and picture, as pure functions of a numpy Generator."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from captionserve_server.demo.art import tile_of
from captionserve_server.demo.captions import write_caption
from captionserve_server.demo.facts import BACKGROUND_COLOURS, ObjectFact, Relation, SceneFacts
from captionserve_server.demo.kinds import KINDS, colours_of

_Choice = TypeVar("_Choice")

SINGLE_OBJECT_SHARE = 0.2
# Objects fill squares of a grid of this many cells a side, a little off. It is the encoder's grid
# of patches, which lets so small a model learn so many objects within an hour.
GRID_CELLS = 4
SUBJECT_CELLS = 2
OTHER_CELLS = 1
_MAX_SHIFT = 0.006
_MAX_SIZE_CHANGE = 0.03
_MAX_ANGLE_DEGREES = 4.0


@dataclass(frozen=True)
class Scene:
    """One captioned picture and the facts behind its caption."""

    image: Image.Image
    caption: str
    facts: SceneFacts
    style: str


@dataclass(frozen=True)
class Placement:
    """Where an object goes: its centre and size as fractions of the canvas, and its turn."""

    x: float
    y: float
    size: float
    angle_degrees: float


def sample_facts(
    rng: np.random.Generator, accept: Callable[[SceneFacts], bool] = lambda _: True
) -> SceneFacts:
    """Draw facts until `accept` takes them."""
    while True:
        facts = _draw_facts(rng)
        if accept(facts):
            return facts


def sample_layout(facts: SceneFacts, rng: np.random.Generator) -> tuple[Placement, ...]:
    """Draw a placement for each object that makes the facts true and plain to see."""
    if facts.relation is None:
        left, top = rng.integers(0, GRID_CELLS - SUBJECT_CELLS, size=2, endpoint=True)
        return (_placed(int(left), int(top), SUBJECT_CELLS, rng),)
    return _draw_pair(facts.relation, rng)


def render(
    facts: SceneFacts,
    layout: tuple[Placement, ...],
    style: str,
    side_pixels: int,
    rng: np.random.Generator,
) -> tuple[Image.Image, tuple[Image.Image, ...]]:
    """Paint the scene on a square canvas.

    Returns:
        The picture (mode RGB) and for each object, as a picture of the same size (mode L), how much
        of every pixel it covers in 0..255.
    """
    canvas = _paint_background(facts.background, side_pixels, rng)
    masks = []
    for fact, placement in zip(facts.objects, layout, strict=True):
        tile = _relight(tile_of(style, fact), rng)
        masks.append(_paste(canvas, tile, placement))
    return canvas, tuple(masks)


def compose_scene(
    facts: SceneFacts, style: str, rng: np.random.Generator, side_pixels: int | None = None
) -> Scene:
    """Compose the picture of these facts on a square canvas of its own or the given size."""
    layout = sample_layout(facts, rng)
    side = int(rng.integers(224, 640)) if side_pixels is None else side_pixels
    image, _ = render(facts, layout, style, side, rng)
    if rng.random() < 0.5:
        image = add_jpeg_artefacts(image, rng)
    return Scene(image, write_caption(facts), facts, style)


def add_jpeg_artefacts(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the image as it looks after JPEG compression of a random quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(40, 96)))
    return Image.open(buffer).convert("RGB")


def _draw_facts(rng: np.random.Generator) -> SceneFacts:
    background = _pick(rng, tuple(BACKGROUND_COLOURS))
    if rng.random() < SINGLE_OBJECT_SHARE:
        return SceneFacts(_draw_object(rng, _pick(rng, KINDS), background), background)
    first, second = rng.choice(len(KINDS), size=2, replace=False)
    subject = _draw_object(rng, KINDS[first], background)
    other = _draw_object(rng, KINDS[second], background)
    return SceneFacts(subject, background, _pick(rng, tuple(Relation)), other)


def _draw_object(rng: np.random.Generator, kind: str, background: str) -> ObjectFact:
    """Draw a colour for the kind: never the background's, which would hide the object."""
    return ObjectFact(kind, _pick(rng, [c for c in colours_of(kind) if c != background]))


def _pick(rng: np.random.Generator, choices: tuple[_Choice, ...] | list[_Choice]) -> _Choice:
    return choices[int(rng.integers(len(choices)))]


def _draw_pair(relation: Relation, rng: np.random.Generator) -> tuple[Placement, ...]:
    """Place the larger subject and the other object along the relation's axis, not overlapping."""
    subject_first = relation in (Relation.LEFT_OF, Relation.ABOVE)
    sizes = (SUBJECT_CELLS, OTHER_CELLS)
    first_cells = sizes[0] if subject_first else sizes[1]
    # The cell that is left over goes before, between or behind the two.
    spare = int(rng.integers(3))
    near = 1 if spare == 0 else 0
    far = near + first_cells + (1 if spare == 1 else 0)
    along = (near, far) if subject_first else (far, near)
    placements = []
    for begin, cells in zip(along, sizes, strict=True):
        across = int(rng.integers(1, GRID_CELLS - cells))
        horizontal = relation in (Relation.LEFT_OF, Relation.RIGHT_OF)
        corner = (begin, across) if horizontal else (across, begin)
        placements.append(_placed(*corner, cells, rng))
    return tuple(placements)


def _placed(left: int, top: int, cells: int, rng: np.random.Generator) -> Placement:
    """A square of cells, a little off: shifted, resized and turned."""
    x, y = ((begin + cells / 2) / GRID_CELLS for begin in (left, top))
    shift_x, shift_y = rng.uniform(-_MAX_SHIFT, _MAX_SHIFT, size=2)
    size = cells / GRID_CELLS * (1 + rng.uniform(-1, 0.2) * _MAX_SIZE_CHANGE)
    angle = float(rng.uniform(-_MAX_ANGLE_DEGREES, _MAX_ANGLE_DEGREES))
    return Placement(x + float(shift_x), y + float(shift_y), size, angle)


def _paint_background(colour: str, side_pixels: int, rng: np.random.Generator) -> Image.Image:
    """Return a shaded, graded, noisy square ground, mode RGB."""
    shade = np.array(BACKGROUND_COLOURS[colour]) + rng.uniform(-12, 12) + rng.uniform(-6, 6, 3)
    across, down = rng.uniform(-14, 14, size=2).astype(np.float32)
    line = np.linspace(-1, 1, side_pixels, dtype=np.float32)
    reach = int(rng.integers(1, 13))
    noise = rng.integers(-reach, reach, size=(side_pixels, side_pixels), dtype=np.int8)
    # Everything up to here is the same for the three channels, so that a table per channel does.
    relief = 128 + across * line[None, :] + down * line[:, None] + noise
    plane = Image.fromarray(relief.astype(np.uint8))
    tables = [(np.arange(256) - 128 + level).clip(0, 255).astype(np.uint8) for level in shade]
    return Image.merge("RGB", [plane.point(table.tolist()) for table in tables])


def _relight(tile: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Return the RGBA tile a little brighter or darker, and a little off in colour."""
    light = rng.uniform(0.88, 1.08) * rng.uniform(0.95, 1.05, 3)
    bands = [
        band.point((np.arange(256) * gain).clip(0, 255).astype(np.uint8).tolist())
        for band, gain in zip(tile.split(), (*light, 1.0), strict=True)
    ]
    return Image.merge("RGBA", bands)


def _paste(canvas: Image.Image, tile: Image.Image, placement: Placement) -> Image.Image:
    """Draw the turned tile onto the canvas; return what it covers, mode L, as large as that."""
    patch, left, top = _turned(tile, placement, canvas.width)
    canvas.paste(patch, (left, top), patch)
    mask = Image.new("L", canvas.size)
    mask.paste(patch.getchannel("A"), (left, top))
    return mask


def _turned(
    tile: Image.Image, placement: Placement, side_pixels: int
) -> tuple[Image.Image, int, int]:
    """Scale and turn the tile; return the part inside the frame, with its left and top pixel."""
    scale = placement.size * side_pixels / tile.width
    cosine = math.cos(math.radians(placement.angle_degrees))
    sine = math.sin(math.radians(placement.angle_degrees))
    centre_x, centre_y = placement.x * side_pixels, placement.y * side_pixels
    half = tile.width / 2
    reach = half * scale * (abs(cosine) + abs(sine))
    left, top = max(0, int(centre_x - reach)), max(0, int(centre_y - reach))
    right = min(side_pixels, math.ceil(centre_x + reach))
    bottom = min(side_pixels, math.ceil(centre_y + reach))
    # PIL maps output pixels back to the tile: undo the shift, the scale, then the turn.
    row_x = (cosine / scale, sine / scale)
    row_y = (-sine / scale, cosine / scale)
    shift_x, shift_y = left - centre_x, top - centre_y
    matrix = (
        *row_x,
        half + row_x[0] * shift_x + row_x[1] * shift_y,
        *row_y,
        half + row_y[0] * shift_x + row_y[1] * shift_y,
    )
    size = (right - left, bottom - top)
    affine = Image.Transform.AFFINE
    return tile.transform(size, affine, matrix, Image.Resampling.BILINEAR), left, top
