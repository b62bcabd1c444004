"""Whole captions as rows of one run, and what reading them with and without an image says."""

from __future__ import annotations

import numpy as np
import pytest
from captionserve_server.core.captions import CaptionPlan, CheckpointRules, DecodedCaption
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search.grounding import (
    Text,
    forced_rows,
    grounded,
    has_own_logprobs,
)
from captionserve_server.core.words import WordTokens
from hypothesis import given
from hypothesis import strategies as st

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(tuple)
texts = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5)
groups_of_texts = st.lists(texts, min_size=1, max_size=3)


@given(groups_of_texts)
def test_every_token_is_asked_for_behind_all_that_stand_before_it(groups: list[list[Text]]) -> None:
    rows = forced_rows(groups)
    histories = []
    for row, sees in enumerate(rows.sees):
        assert sees[row]
        seen = np.flatnonzero(sees)
        # In their order, each at the position that it has in the text.
        assert rows.positions[seen].tolist() == list(range(len(seen)))
        histories.append(tuple(rows.tokens[seen].tolist()))
    asked = zip(rows.probe_rows.tolist(), rows.probe_tokens.tolist(), strict=True)
    expected = [
        ((*given, *generated[:end]), generated[end])
        for texts in groups
        for given, generated in texts
        for end in range(len(generated))
    ]
    assert [(histories[row], token) for row, token in asked] == expected


@given(texts)
def test_captions_that_begin_alike_share_their_rows(texts: list[Text]) -> None:
    wholes = [(*given, *generated) for given, generated in texts]
    beginnings = {whole[:end] for whole in wholes for end in range(1, len(whole))}
    asked = forced_rows([texts])
    assert len(asked.tokens) - 4 < len(beginnings) <= len(asked.tokens)
    assert len(np.unique(asked.probe_rows)) <= len(beginnings)


@given(groups_of_texts)
def test_a_group_has_the_rows_that_it_has_alone_at_a_multiple_of_four(
    groups: list[list[Text]],
) -> None:
    together, alone = forced_rows(groups), [forced_rows([texts]) for texts in groups]
    begin = 0
    for own in alone:
        assert begin % 4 == 0
        rows = slice(begin, begin + len(own.tokens))
        assert together.tokens[rows].tolist() == own.tokens.tolist()
        assert together.positions[rows].tolist() == own.positions.tolist()
        # It sees its own alone, and nothing else sees it.
        assert together.sees[rows, rows].tolist() == own.sees.tolist()
        assert together.sees[rows].sum() == together.sees[:, rows].sum() == own.sees.sum()
        begin += len(own.tokens)
    assert begin == len(together.tokens)


@pytest.mark.parametrize(
    ("plan", "own"),
    [
        (CaptionPlan(DecodingOptions()), True),
        (CaptionPlan(DecodingOptions(num_beams=4, length_penalty=2.0)), True),
        (CaptionPlan(DecodingOptions(do_sample=True, temperature=0.5)), True),
        (CaptionPlan(DecodingOptions(), WordTokens(prefix=(5,))), True),
        (CaptionPlan(DecodingOptions(repetition_penalty=1.1)), False),
        (CaptionPlan(DecodingOptions(suppress_tokens=(4,))), False),
        (CaptionPlan(DecodingOptions(), WordTokens(bad=((6,),))), False),
        (
            CaptionPlan(DecodingOptions(num_beams=4, num_beam_groups=2, diversity_penalty=0.5)),
            False,
        ),
        (CaptionPlan(DecodingOptions(), rules=CheckpointRules(forced_bos_token_id=3)), False),
    ],
)
def test_log_probabilities_that_something_changed_are_not_the_models_own(
    plan: CaptionPlan, own: bool
) -> None:
    assert has_own_logprobs(plan) is own


def caption(*token_ids: int) -> DecodedCaption:
    return DecodedCaption(token_ids, (-0.5,) * len(token_ids), -0.5, "eos")


CAPTIONS = [caption(1, 2), caption(3), caption(4, 5)]
WITH_IMAGE = np.array([-1.0, -1.0, -0.5, -0.25, -0.25], np.float32)
WITHOUT = np.array([-2.0, -1.5, -3.0, -1.0, -1.0], np.float32)


def test_each_token_has_what_the_image_adds() -> None:
    plan = CaptionPlan(DecodingOptions(num_beams=3, num_return_sequences=3))
    found = grounded(CAPTIONS, plan, WITH_IMAGE, WITHOUT, (0.5, 2.0))
    assert {each.image_state for each in found} == {(0.5, 2.0)}
    assert [each.token_groundings for each in found] == [(1.0, 0.5), (2.5,), (0.75, 0.75)]
    assert [each.grounding for each in found] == [0.75, 2.5, 0.75]
    assert [each.token_ids for each in found] == [each.token_ids for each in CAPTIONS]


def test_captions_are_reranked_by_likelihood_and_grounding_and_equals_stay_in_their_order() -> None:
    plan = CaptionPlan(DecodingOptions(num_beams=3, num_return_sequences=2, rerank="grounding"))
    # By 0.8 x log-probability + 0.2 x grounding: -0.65, 0.1 and -0.05.
    found = grounded(CAPTIONS, plan, WITH_IMAGE, WITHOUT)
    assert [each.token_ids for each in found] == [(3,), (4, 5)]
    same = [caption(1), caption(2), caption(3)]
    found = grounded(same, plan, np.full(3, -1, np.float32), np.full(3, -2, np.float32))
    assert [each.token_ids for each in found] == [(1,), (2,)]
