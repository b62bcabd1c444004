"""Beam search, in groups too, against the reference on a model that is a table."""

from __future__ import annotations

import numpy as np
import pytest
from captionserve_server.core.captions import CaptionPlan, SpecialTokens
from captionserve_server.core.options import EARLY_STOPPING_VALUES, DecodingOptions, EarlyStopping
from captionserve_server.core.search import Vocabulary, start_search
from captionserve_server.core.words import WordTokens
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_search import Row, Tokens, diverse_beam_search
from tests.unit.core.fake_step_model import END, START, VOCABULARY_SIZE, logprobs
from tests.unit.core.search.search_run import Run, rules_of

LANES = 3


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(2, 1), (3, 1), (4, 1), (4, 2), (4, 4), (6, 3)]),
    st.integers(5, 10),
    st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
    st.sampled_from(EARLY_STOPPING_VALUES),
    st.sampled_from([(), (5, 7)]),
    st.integers(0, 1000),
)
def test_every_lane_is_what_the_reference_finds(
    size: tuple[int, int],
    max_length: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    prefix: Tokens,
    image: int,
) -> None:
    beams, groups = size
    options = DecodingOptions(
        num_beams=beams,
        num_beam_groups=groups,
        num_return_sequences=beams,
        diversity_penalty=0.7 if groups > 1 else 0.0,
        max_length=max_length,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    found = Run(
        [CaptionPlan(options, WordTokens(prefix=prefix))] * LANES, image
    ).finished_captions()
    rules = rules_of(options, (START, *prefix), beams // groups)
    for lane, captions in enumerate(found):

        def table(sequences: list[Tokens], image: int = image + lane) -> list[Row]:
            return [logprobs(image, sequence) for sequence in sequences]

        expected = diverse_beam_search(
            table, rules, groups=groups, diversity_penalty=options.diversity_penalty
        )[:beams]
        assert [each.token_ids for each in captions] == [e.hypothesis.tokens for e in expected]
        scores = [each.score for each in captions]
        assert scores == pytest.approx([each.score for each in expected], rel=1e-5)


def test_where_options_leave_fewer_tokens_than_beams_no_caption_is_made_up() -> None:
    allowed = {4, END}
    suppressed = tuple(token for token in range(VOCABULARY_SIZE) if token not in allowed)
    options = DecodingOptions(
        num_beams=4, num_return_sequences=4, max_length=3, suppress_tokens=suppressed
    )
    vocabulary = Vocabulary(SpecialTokens(START, (END,)), VOCABULARY_SIZE)
    run = Run([CaptionPlan(options)])
    run.search = start_search(options, vocabulary).joined(CaptionPlan(options))
    [captions] = run.finished_captions()
    assert {each.token_ids for each in captions} == {(END,), (4, END), (4, 4)}
    assert all(np.isfinite(each.score) for each in captions)
