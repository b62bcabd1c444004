"""What a listener is told piece by piece is the caption and its search, at whatever pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from captionserve_server.core.beams import beam_history
from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.history import HistoryStep
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.updates import Update, Updates
from captionserve_server.core.words import WordTokens
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.core.search.search_run import Run


def decode(token_ids: Sequence[int]) -> str:
    # Letters all of them, of which no text is stripped.
    return "".join(chr(0x100 + token) for token in token_ids)


def text(token: int) -> str:
    return decode([token])


@dataclass
class At:
    """A place in a caption that is being decoded."""

    caption: DecodedCaption
    tokens: int
    steps: int = 0

    def certain_tokens(self) -> tuple[int, ...]:
        return self.caption.token_ids[: self.tokens]

    def history(self) -> tuple[HistoryStep, ...]:
        assert self.caption.history is not None, "it was asked for"
        return self.caption.history.steps[: self.steps]


def told(
    plan: CaptionPlan, caption: DecodedCaption, places: Sequence[tuple[int, int]]
) -> list[Update]:
    """What is told of a caption that was heard of at these places, tokens and steps."""
    updates = Updates(plan, decode, text)
    news = [updates.news(At(caption, *place)) for place in places]
    # The other thread comes later.
    last = updates.last_news(caption)
    found = [updates.update(each) for each in [*news, last] if each is not None]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("beams", [1, 3])
@settings(max_examples=60, deadline=None)
@given(
    image=st.integers(0, 1000),
    prefix=st.sampled_from([(), (5,), (7, 3)]),
    pace=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8),
)
def test_all_updates_together_are_the_caption_and_its_search(
    beams: int, image: int, prefix: tuple[int, ...], pace: list[tuple[int, int]]
) -> None:
    options = DecodingOptions(num_beams=beams, max_length=12, output_beams=True)
    plan = CaptionPlan(options, WordTokens(prefix=prefix))
    ((caption, *_),) = Run([plan], first_image=image).finished_captions()
    tokens, steps = (sorted(each) for each in zip(*pace, strict=True)) if pace else ([], [])
    places = list(zip(tokens, steps, strict=True))
    updates = told(plan, caption, places)
    assert "".join(each.text for each in updates) == decode((*prefix, *caption.token_ids))
    assert sum((each.token_ids for each in updates), ()) == caption.token_ids
    history = beam_history([caption], text)
    assert history is not None
    assert sum((each.beam_steps for each in updates), ()) == history.steps
    # Nobody hears of nothing.
    assert all(each.text or each.token_ids or each.beam_steps for each in updates)
    assert len(updates) <= len(set(places)) + 1


def test_steps_are_told_without_words() -> None:
    options = DecodingOptions(num_beams=3, max_length=12, output_beams=True)
    ((caption, *_),) = Run([CaptionPlan(options)], first_image=4).finished_captions()
    first, *_ = told(CaptionPlan(options), caption, [(0, 2)])
    assert (first.text, first.token_ids, len(first.beam_steps)) == ("", (), 2)


def test_a_history_that_nobody_wants_is_not_asked_for() -> None:
    plan = CaptionPlan(DecodingOptions(max_length=12))
    ((caption,),) = Run([plan], first_image=4).finished_captions()
    assert caption.history is None
    updates = told(plan, caption, [(1, 1), (1, 2), (3, 3)])
    assert [len(each.token_ids) for each in updates[:2]] == [1, 2]
    assert all(each.beam_steps == () for each in updates)
