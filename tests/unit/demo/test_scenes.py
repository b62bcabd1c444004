"""The demo scenes: captions round trip, held-out facts stay out, and seeds repeat."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
from captionserve_server.demo.art import art_index, tile_of
from captionserve_server.demo.captions import parse_caption, write_caption
from captionserve_server.demo.facts import (
    BACKGROUND_COLOURS,
    ObjectFact,
    Relation,
    SceneFacts,
)
from captionserve_server.demo.kinds import KINDS, all_code_points, colours_of
from captionserve_server.demo.scenes import compose_scene, render, sample_facts, sample_layout
from captionserve_server.demo.splits import TRAINING_STYLES, UNSEEN_STYLE, is_held_out
from captionserve_server.evaluation.held_out import Split, held_out_scenes
from hypothesis import given, settings
from hypothesis import strategies as st

ALL_STYLES = (*TRAINING_STYLES, UNSEEN_STYLE)
SPLITS: tuple[Split, ...] = ("unseen_combinations", "unseen_style")

objects = st.sampled_from(
    [ObjectFact(kind, colour) for kind in KINDS for colour in colours_of(kind)]
)
backgrounds = st.sampled_from(sorted(BACKGROUND_COLOURS))
single_facts = st.builds(SceneFacts, objects, backgrounds)
pair_facts = st.builds(SceneFacts, objects, backgrounds, st.sampled_from(Relation), objects)
seeds = st.integers(min_value=0, max_value=2**32 - 1)


@given(single_facts | pair_facts)
def test_captions_round_trip(facts: SceneFacts) -> None:
    assert parse_caption(write_caption(facts)) == facts


@given(
    st.text()
    | st.lists(st.sampled_from(["a", "red", "fox", "on", "above", "background"])).map(" ".join)
)
def test_parsing_never_fails(text: str) -> None:
    facts = parse_caption(text)
    assert facts is None or write_caption(facts)


@pytest.mark.parametrize(
    ("caption", "facts"),
    [
        ("a fox on a red background", SceneFacts(ObjectFact("fox"), "red")),
        ("  An  FOX on a red background ", SceneFacts(ObjectFact("fox"), "red")),
        (
            "an orange book above grapes on a gray background",
            SceneFacts(ObjectFact("book", "orange"), "gray", Relation.ABOVE, ObjectFact("grapes")),
        ),
        ("a book on a gray background", None),
        ("a red fox on a gray background", None),
        ("a fox on a pink background", None),
        ("a fox above a red background", None),
        ("a fox fox on a red background", None),
        ("a fox above a dragon on a red background", None),
        ("", None),
    ],
)
def test_parsing_by_example(caption: str, facts: SceneFacts | None) -> None:
    assert parse_caption(caption) == facts


def test_articles() -> None:
    facts = SceneFacts(ObjectFact("owl"), "red", Relation.BELOW, ObjectFact("cherries"))
    assert write_caption(facts) == "an owl below cherries on a red background"


def test_a_relation_needs_another_object() -> None:
    with pytest.raises(ValueError, match="together"):
        SceneFacts(ObjectFact("fox"), "red", Relation.ABOVE)


@given(pair_facts)
def test_a_pair_of_kinds_is_held_out_as_a_whole(facts: SceneFacts) -> None:
    assert facts.other is not None
    mirrored = SceneFacts(facts.other, "white", Relation.LEFT_OF, facts.subject)
    assert is_held_out(facts) == is_held_out(mirrored)


def test_the_held_out_share_is_as_stated() -> None:
    rng = np.random.default_rng(0)
    share = np.mean([is_held_out(sample_facts(rng)) for _ in range(4000)])
    assert 0.12 < share < 0.18


@pytest.mark.parametrize("split", SPLITS)
def test_evaluation_shows_only_what_training_never_does(split: Split) -> None:
    scenes = list(held_out_scenes(split, 40, seed=3))
    styles = {scene.style for scene in scenes}
    assert all(is_held_out(scene.facts) for scene in scenes)
    assert styles == ({UNSEEN_STYLE} if split == "unseen_style" else set(TRAINING_STYLES))


def test_training_facts_are_never_held_out() -> None:
    batches = pytest.importorskip("captionserve_server.demo.batches", exc_type=ImportError)
    rng = np.random.default_rng(1)
    assert not any(is_held_out(batches.training_facts(rng)) for _ in range(3000))


def test_a_seed_repeats_its_scenes() -> None:
    first, again = (list(held_out_scenes("unseen_combinations", 5, seed=7)) for _ in range(2))
    other = list(held_out_scenes("unseen_combinations", 5, seed=8))
    assert [s.caption for s in first] == [s.caption for s in again]
    assert [s.image.tobytes() for s in first] == [s.image.tobytes() for s in again]
    assert [s.caption for s in first] != [s.caption for s in other]


@given(seeds)
def test_layouts_stay_on_the_canvas_and_tell_the_truth(seed: int) -> None:
    rng = np.random.default_rng(seed)
    facts = sample_facts(rng)
    layout = sample_layout(facts, rng)
    assert all(0 < place.x < 1 and 0 < place.y < 1 for place in layout)
    if facts.relation is not None:
        subject, other = layout
        assert subject.size > 1.3 * other.size
        seen = {
            Relation.LEFT_OF: other.x - subject.x,
            Relation.RIGHT_OF: subject.x - other.x,
            Relation.ABOVE: other.y - subject.y,
            Relation.BELOW: subject.y - other.y,
        }
        assert max(seen, key=lambda relation: seen[relation]) is facts.relation


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_objects_are_painted_apart_and_in_full_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    facts = sample_facts(rng)
    image, masks = render(facts, sample_layout(facts, rng), "noto", 120, rng)
    covered = [np.asarray(mask) > 127 for mask in masks]
    assert image.size == (120, 120)
    assert image.mode == "RGB"
    assert len(covered) == len(facts.objects)
    assert all(mask.mean() > 0.005 for mask in covered)


def test_a_scene_carries_its_own_caption() -> None:
    facts = SceneFacts(ObjectFact("heart", "blue"), "white")
    scene = compose_scene(facts, "twemoji", np.random.default_rng(0), side_pixels=300)
    assert scene.caption == "a blue heart on a white background"
    assert scene.image.size == (300, 300)


@pytest.mark.parametrize("style", ALL_STYLES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_object_has_art_in_every_style(style: str, kind: str) -> None:
    for colour in colours_of(kind):
        tile = np.asarray(tile_of(style, ObjectFact(kind, colour)))
        assert tile.shape == (72, 72, 4)
        assert (tile[..., 3] > 127).mean() > 0.05


@pytest.mark.parametrize("kind", ["automobile", "balloon"])
@pytest.mark.parametrize("style", ALL_STYLES)
def test_tints_look_different(style: str, kind: str) -> None:
    tiles = {tile_of(style, ObjectFact(kind, colour)).tobytes() for colour in colours_of(kind)}
    assert len(tiles) == len(colours_of(kind))


def test_the_index_names_all_art_and_the_attribution_all_packages() -> None:
    attribution = (files("captionserve_server.demo") / "art" / "ATTRIBUTION.md").read_text("utf-8")
    index = art_index()
    assert index.code_points == all_code_points()
    assert set(index.styles) == set(ALL_STYLES)
    assert all(f"`{package}`" in attribution for package in index.styles.values())
    assert all(f"`{style}.png`" in attribution for style in index.styles)
