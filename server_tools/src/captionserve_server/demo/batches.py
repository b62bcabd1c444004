"""Endless training batches: rendered scenes, their token ids, and labels for every patch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import GPT2Tokenizer

from captionserve_server.demo.captions import write_caption
from captionserve_server.demo.checkpoint import IMAGE_SIZE_PIXELS, ModelSize
from captionserve_server.demo.facts import TINT_HUES_DEGREES, Relation, SceneFacts
from captionserve_server.demo.kinds import KINDS
from captionserve_server.demo.scenes import (
    add_jpeg_artefacts,
    render,
    sample_facts,
    sample_layout,
)
from captionserve_server.demo.splits import TRAINING_STYLES, is_held_out

IGNORED = -100
_MIN_COVERAGE = 40  # of 255
_COLOURS: tuple[str | None, ...] = (None, *TINT_HUES_DEGREES)
_RELATIONS: tuple[Relation | None, ...] = (None, *Relation)
KIND_CLASSES = len(KINDS)
COLOUR_CLASSES = len(_COLOURS)
ROLE_CLASSES = 3
RELATION_CLASSES = len(_RELATIONS)

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One training scene.

    Attributes:
        pixels: uint8 [224, 224, 3].
        caption: the true caption.
        patch_labels: int64 [4, patches], the class of each patch's kind, colour, role and relation.
    """

    pixels: Pixels
    caption: str
    patch_labels: Labels


@dataclass(frozen=True)
class Batch:
    """Samples stacked for one step.

    Attributes:
        pixels: uint8 [batch, 224, 224, 3].
        tokens: int64 [batch, length], the caption closed by the end token, then `IGNORED`.
        patch_labels: int64 [batch, 4, patches].
    """

    pixels: Pixels
    tokens: Labels
    patch_labels: Labels


def training_facts(rng: np.random.Generator) -> SceneFacts:
    """Draw facts that are not held out."""
    return sample_facts(rng, accept=lambda facts: not is_held_out(facts))


def draw_sample(rng: np.random.Generator, size: ModelSize) -> Sample:
    """Draw and render one training scene, as the image processor would hand it to the model."""
    facts = training_facts(rng)
    layout = sample_layout(facts, rng)
    style = TRAINING_STYLES[int(rng.integers(len(TRAINING_STYLES)))]
    target = (IMAGE_SIZE_PIXELS, IMAGE_SIZE_PIXELS)
    image, masks = render(facts, layout, style, _side_pixels(rng), rng)
    if rng.random() < 0.35:
        image = add_jpeg_artefacts(image, rng)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BILINEAR)
    labels = label_patches(facts, masks, size.patches_per_side)
    return Sample(np.asarray(image), write_caption(facts), labels)


def label_patches(
    facts: SceneFacts, masks: tuple[Image.Image, ...], patches_per_side: int
) -> Labels:
    """Name what covers each patch, from the objects' masks (mode L, as `render` returns them).

    Returns:
        int64 [4, patches]: kind, colour (0 for none), role (0 for background, 1 subject, 2 other)
        and the scene's relation (0 for none); all but the role are `IGNORED` on background.
    """
    coverage = np.stack([_mean_by_patch(mask, patches_per_side) for mask in masks])
    shown = np.where(coverage.max(axis=0) >= _MIN_COVERAGE, coverage.argmax(axis=0) + 1, 0)
    kinds = [IGNORED, *(KINDS.index(fact.kind) for fact in facts.objects)]
    colours = [IGNORED, *(_COLOURS.index(fact.colour) for fact in facts.objects)]
    relations = [IGNORED, *[_RELATIONS.index(facts.relation)] * len(facts.objects)]
    rows = [np.array(classes)[shown] for classes in (kinds, colours, range(3), relations)]
    labels: Labels = np.stack(rows).astype(np.int64)
    return labels


def batches(tokenizer: GPT2Tokenizer, size: ModelSize, count: int, seed: int) -> Iterator[Batch]:
    """Yield batches of `count` samples without end; the same seed yields the same ones."""
    rng = np.random.default_rng(seed)
    while True:
        samples = [draw_sample(rng, size) for _ in range(count)]
        yield Batch(
            pixels=np.stack([sample.pixels for sample in samples]),
            tokens=_pad([tokenizer.encode(s.caption) for s in samples], tokenizer.eos_token_id),
            patch_labels=np.stack([sample.patch_labels for sample in samples]),
        )


def _side_pixels(rng: np.random.Generator) -> int:
    """Mostly the model's own size, which is cheap; sometimes another, then resampled to it."""
    return IMAGE_SIZE_PIXELS if rng.random() < 0.75 else int(rng.integers(200, 440))


def _mean_by_patch(mask: Image.Image, patches_per_side: int) -> npt.NDArray[np.uint8]:
    """Average a mask (mode L) over the grid of patches; returns uint8 [patches] in 0..255."""
    grid = (patches_per_side, patches_per_side)
    return np.asarray(mask.resize(grid, Image.Resampling.BOX)).reshape(-1)


def _pad(token_ids: list[list[int]], end: int) -> Labels:
    length = 1 + max(len(ids) for ids in token_ids)
    padded = np.full((len(token_ids), length), IGNORED, dtype=np.int64)
    for row, ids in zip(padded, token_ids, strict=True):
        row[: len(ids)] = ids
        row[len(ids)] = end
    return padded
