"""What a search remembers of its steps says truly how its captions came about."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from captionserve_server.core.beams import BeamHistory, beam_history
from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.history import LIKELIEST
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.words import ForcedWord, WordTokens
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.core.fake_step_model import END
from tests.unit.core.search.search_run import VOCABULARY, Run

SEARCHES: list[dict[str, Any]] = [
    {},
    {"num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True, "length_penalty": 2.0},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7, "num_return_sequences": 6},
    {"num_beams": 5, "num_return_sequences": 4, "force_words": ("stand-in",)},
    {"do_sample": True, "num_return_sequences": 3, "seed": 7, "top_k": 12},
    {"do_sample": True, "seed": 3, "top_k": 1},
]
WORDS = WordTokens(forced=(ForcedWord((11,), (11,)), ForcedWord((12, 13), (12, 13))))


def plan(**options: Any) -> CaptionPlan:
    asked = DecodingOptions(**{"max_length": 12, **options})
    return CaptionPlan(asked, WORDS if asked.force_words else WordTokens())


def text(token: int) -> str:
    return "" if token == END else f" {token}"


def told(captions: Sequence[DecodedCaption]) -> BeamHistory:
    history = beam_history(captions, text)
    assert history is not None
    return history


def captions_of(images: Sequence[int], **options: Any) -> list[list[DecodedCaption]]:
    run = Run([plan(**options) for _ in images], first_image=images[0])
    return run.finished_captions()


def check(captions: Sequence[DecodedCaption], beams: int) -> None:
    """That the history leads to every caption, step by step, and to nothing else."""
    history = told(captions)
    assert len(history.paths) == len(captions)
    for caption, path in zip(captions, history.paths, strict=True):
        walked = [step[at] for step, at in zip(history.steps, path.continuations, strict=False)]
        assert tuple(each.token_id for each in walked) == caption.token_ids
        assert [each.token_logprob for each in walked] == list(caption.token_logprobs)
        assert [each.fate for each in walked[:-1]] == ["kept"] * (len(walked) - 1)
        assert walked[-1].fate == ("kept" if caption.finish_reason == "deadline" else "finished")
        for before, after in pairwise(walked):
            assert after.parent == before.beam
            assert after.score == pytest.approx(before.score + after.token_logprob, abs=1e-4)
    alive = {0}
    for number, step in enumerate(history.steps):
        assert len({(each.parent, each.token_id) for each in step}) == len(step)
        if number:
            assert {each.parent for each in step} <= alive
        kept = [each.beam for each in step if each.fate == "kept"]
        assert len(set(kept)) == len(kept) <= beams
        alive = {beam for beam in kept if beam is not None}
        assert all((each.beam is None) == (each.fate != "kept") for each in step)


@pytest.mark.parametrize("options", SEARCHES, ids=str)
@settings(deadline=None, max_examples=25)
@given(image=st.integers(0, 2**24 - 8))
def test_the_history_leads_to_every_caption(options: dict[str, Any], image: int) -> None:
    several = captions_of(range(image, image + 2), output_beams=True, **options)
    for captions in several:
        check(captions, DecodingOptions(**options).rows)


@pytest.mark.parametrize("options", SEARCHES, ids=str)
@settings(deadline=None, max_examples=25)
@given(image=st.integers(0, 2**24 - 8))
def test_who_wants_a_history_changes_no_caption(options: dict[str, Any], image: int) -> None:
    asking = Run([plan(**options), plan(output_beams=True, **options)], first_image=image)
    together = asking.finished_captions()
    alone = Run([plan(**options), plan(**options)], first_image=image).finished_captions()
    for with_history, without in zip(together, alone, strict=True):
        assert [each.token_ids for each in with_history] == [each.token_ids for each in without]
        assert [each.score for each in with_history] == [each.score for each in without]
    assert all(each.history is None for each in together[0])
    assert all(each.history is not None for each in together[1])


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_the_likeliest_tokens_of_each_place_come_in_order(options: dict[str, Any]) -> None:
    for captions in captions_of([5, 6, 7], output_beams=True, **options):
        for caption, path in zip(captions, told(captions).paths, strict=True):
            assert len(path.likeliest) == len(caption.token_ids)
            for token, logprob, likeliest in zip(
                caption.token_ids, caption.token_logprobs, path.likeliest, strict=True
            ):
                logprobs = [each.token_logprob for each in likeliest]
                assert 1 <= len(likeliest) <= LIKELIEST
                assert logprobs == sorted(logprobs, reverse=True)
                own = [each.token_logprob for each in likeliest if each.token_id == token]
                # The penalty between groups is no part of what the model thinks.
                if own and not options.get("diversity_penalty"):
                    assert own == [logprob]


def test_greedy_search_takes_the_likeliest_and_tells_of_others() -> None:
    ((caption,),) = captions_of([3], output_beams=True)
    for step, likeliest in zip(
        told([caption]).steps, told([caption]).paths[0].likeliest, strict=True
    ):
        assert [each.token_id for each in step] == [each.token_id for each in likeliest]
        assert [each.fate == "dropped" for each in step] == [False] + [True] * (len(step) - 1)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_history_is_bounded(groups: int) -> None:
    options = {"num_beams": 16, "max_length": 128, "min_length": 100}
    more = {"num_beam_groups": groups, "diversity_penalty": 0.5} if groups > 1 else {}
    ((caption, *_),) = captions_of([1], output_beams=True, **options, **more)
    history = told([caption])
    assert len(history.steps) <= 127
    assert all(len(step) <= 2 * 16 for step in history.steps)
    # Something is dropped, or the tree would have nothing to show.
    assert any(each.fate == "dropped" for step in history.steps for each in step)


def test_required_words_tell_of_what_was_dropped_too() -> None:
    ((caption, *_),) = captions_of([2], output_beams=True, num_beams=4, force_words=("stand-in",))
    fates = {each.fate for step in told([caption]).steps for each in step}
    assert fates == {"kept", "dropped", "finished"}


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_the_best_so_far_has_its_history_too(options: dict[str, Any]) -> None:
    run = Run([plan(output_beams=True, min_length=11, **options)], first_image=9)
    for _ in range(4):
        run.advance()
    captions = run.search.best_so_far(0)
    if captions:
        check(captions, DecodingOptions(**options).rows)
        assert len(captions[0].token_ids) == 4


def test_two_groups_that_finish_with_the_same_first_token_are_told_apart() -> None:
    captions = captions_of(
        [4],
        output_beams=True,
        max_length=2,
        num_beams=4,
        num_beam_groups=2,
        num_return_sequences=4,
        diversity_penalty=0.001,
    )[0]
    history = told(captions)
    walked = [(history.steps[0][path.continuations[0]], path) for path in history.paths]
    chosen = [path.continuations[0] for _, path in walked]
    assert len(set(chosen)) == len(captions)
    assert {each.parent for each, _ in walked} == {0, 2}


def test_no_history_is_told_where_none_was_wanted() -> None:
    ((caption,),) = captions_of([3])
    assert beam_history([caption], text) is None


def test_nothing_of_a_history_holds_on_to_the_candidates_of_its_step() -> None:
    ((caption,),) = captions_of([3], output_beams=True, do_sample=True, seed=1, top_k=0)
    assert caption.history is not None
    for step in caption.history.steps:
        for array in vars(step).values():
            assert array.base is None or array.base.size < VOCABULARY.size
            assert np.isfinite(array).any()
