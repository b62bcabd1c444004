"""What every search promises: it is never changed, and lanes know nothing of each other."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from captionserve_server.core.captions import CaptionPlan
from captionserve_server.core.options import EARLY_STOPPING_VALUES, DecodingOptions
from captionserve_server.core.search import start_search
from captionserve_server.core.step_model import StepAnswer
from captionserve_server.core.words import ForcedWord, WordTokens
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.unit.core.fake_step_model import START
from tests.unit.core.search.search_run import VOCABULARY, Run

WORDS = (ForcedWord((21, 22), (23,)), ForcedWord((24,), None))

# Options that make captions lanes of one search, and options in which its lanes may differ.
KINDS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    {"num_beams": 3, "force_words": ("stand-in",)},
    {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
]
differing = st.fixed_dictionaries(
    {
        "max_length": st.integers(8, 12),
        "length_penalty": st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
        "min_length": st.integers(0, 5),
        "repetition_penalty": st.sampled_from([1.0, 1.6]),
        "output_attentions": st.booleans(),
    }
)
early_stopping = st.sampled_from(EARLY_STOPPING_VALUES)


@st.composite
def plans_of_a_kind(draw: st.DrawFn) -> list[CaptionPlan]:
    kind = draw(st.sampled_from(KINDS))
    plans = []
    for seed in range(draw(st.integers(1, 4))):
        options: dict[str, Any] = {**draw(differing), **kind}
        if "num_beams" in kind:
            options["early_stopping"] = draw(early_stopping)
        if "do_sample" in kind:
            options["seed"] = seed
        words = WordTokens(
            prefix=draw(st.sampled_from([(), (5,), (7, 4)])),
            forced=WORDS if "force_words" in kind else (),
        )
        plans.append(CaptionPlan(DecodingOptions(**options), words))
    return plans


def as_bytes(captions: object) -> bytes:
    return pickle.dumps(captions)


@settings(max_examples=60, deadline=None)
@given(plans_of_a_kind())
def test_lanes_together_become_what_each_becomes_alone(plans: list[CaptionPlan]) -> None:
    together = Run(plans).finished_captions()
    alone = [Run([plan], image).finished_captions()[0] for image, plan in enumerate(plans)]
    for found, expected in zip(together, alone, strict=True):
        assert [caption.token_ids for caption in found] == [each.token_ids for each in expected]
        assert [caption.score for caption in found] == [each.score for each in expected]
        for caption, true in zip(found, expected, strict=True):
            np.testing.assert_equal(caption.attention, true.attention)


@settings(max_examples=60, deadline=None)
@given(plans_of_a_kind(), st.integers(0, 8), st.data())
def test_nothing_changes_a_search(
    plans: list[CaptionPlan], steps: int, data: st.DataObject
) -> None:
    run = Run(plans)
    for _ in range(steps):
        run.advance()
        assume(not run.search.finished.all())
    search = run.search
    before = as_bytes(search)
    step, answer = run.ask()

    after = step.advance(answer)
    again = step.advance(answer)
    staying = np.array([data.draw(st.booleans()) for _ in plans])
    after.kept(staying)
    after.step()
    search.joined(plans[0])

    assert as_bytes(search) == before
    assert as_bytes(after) == as_bytes(again)


@settings(max_examples=40, deadline=None)
@given(plans_of_a_kind(), st.integers(0, 5))
def test_a_step_of_one_lane_kept_alone_is_its_part_of_the_step_of_all(
    plans: list[CaptionPlan], steps: int
) -> None:
    run = Run(plans)
    for _ in range(steps):
        run.advance()
        assume(not run.search.finished.all())
    step, answer = run.ask()
    together = step.advance(answer)
    rows = np.cumsum(step.row_counts)
    candidates = np.cumsum([0, *step.rows.candidate_counts.tolist()])
    for lane in range(len(plans)):
        mask = np.arange(len(plans)) == lane
        alone = run.search.kept(mask).step()
        own = slice(int(rows[lane] - step.row_counts[lane]), int(rows[lane]))
        np.testing.assert_equal(alone.rows.tokens, step.rows.tokens[own])
        np.testing.assert_equal(alone.rows.parents, step.rows.parents[own])
        cells = slice(candidates[own.start], candidates[own.stop])
        probed = (step.rows.probe_rows >= own.start) & (step.rows.probe_rows < own.stop)
        attended = (step.rows.attention_rows >= own.start) & (step.rows.attention_rows < own.stop)
        after = alone.advance(
            StepAnswer(
                answer.logprobs[cells],
                answer.tokens[cells],
                answer.probe_logprobs[probed],
                answer.attention[attended],
            )
        )
        assert after.finished[0] == together.finished[lane]
        assert after.certain_tokens(0) == together.certain_tokens(lane)
        best, expected = after.best_so_far(0), together.best_so_far(lane)
        assert [each.token_ids for each in best] == [each.token_ids for each in expected]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_search_begins_without_lanes(kind: dict[str, Any]) -> None:
    options = DecodingOptions(**kind)
    search = start_search(options, VOCABULARY)
    assert len(search) == 0
    joined = search.joined(CaptionPlan(options))
    assert len(joined) == 1
    assert len(search) == 0
    assert len(joined.kept(np.array([False]))) == 0


def test_the_prefix_is_read_by_one_row_that_gets_no_candidates_before_its_last_token() -> None:
    options = DecodingOptions(num_beams=3, max_length=9)
    run = Run([CaptionPlan(options, WordTokens(prefix=(5, 6)))])
    for token, candidates in ((START, 0), (5, 0), (6, 9)):
        assert run.search.best_so_far(0) == []
        rows = run.search.step().rows
        assert rows.tokens.tolist() == [token]
        assert rows.candidate_counts.tolist() == [candidates]
        assert rows.parents.tolist() == [0]
        run.advance()
    assert len(run.search.step().rows.tokens) == 3


def test_a_lane_that_is_finished_asks_for_nothing_and_stays_as_it_is() -> None:
    short = CaptionPlan(DecodingOptions(num_beams=2, max_length=2))
    long = CaptionPlan(DecodingOptions(num_beams=2, max_length=8, min_length=6))
    run = Run([short, long])
    run.advance()
    assert run.search.finished.tolist() == [True, False]
    captions = run.search.captions(0)
    step, _ = run.ask()
    assert step.row_counts.tolist() == [0, 2]
    run.advance()
    assert run.search.captions(0) == captions
