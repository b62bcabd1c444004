"""Constrained beam search against the reference on a model that is a table."""

from __future__ import annotations

import pytest
from captionserve_server.core.captions import CaptionPlan
from captionserve_server.core.options import EARLY_STOPPING_VALUES, DecodingOptions, EarlyStopping
from captionserve_server.core.words import ForcedWord, WordTokens
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_search import Constraint, Row, Tokens, constrained_beam_search
from tests.unit.core.fake_step_model import START, logprobs
from tests.unit.core.search.search_run import Run, rules_of

LANES = 2
words = st.sampled_from(
    [
        (ForcedWord((21, 22), (23,)), ForcedWord((24,), None)),
        (ForcedWord((21, 22), (22, 21)),),
        (ForcedWord((5,), None), ForcedWord((21, 21, 22), None)),
        (ForcedWord((5, 6, 5, 7), (6, 7, 8)),),
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    words,
    st.integers(2, 5),
    st.integers(6, 10),
    st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
    st.sampled_from(EARLY_STOPPING_VALUES),
    st.integers(0, 1000),
)
def test_every_lane_is_what_the_reference_finds(
    forced: tuple[ForcedWord, ...],
    beams: int,
    max_length: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    image: int,
) -> None:
    options = DecodingOptions(
        num_beams=beams,
        num_return_sequences=beams,
        force_words=("stand-in",),
        max_length=max_length,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    plan = CaptionPlan(options, WordTokens(forced=forced))
    found = Run([plan] * LANES, image).finished_captions()
    rules = rules_of(options, (START,), beams)
    constraints = [Constraint(word.spaced, word.initial) for word in forced]
    for lane, captions in enumerate(found):

        def table(sequences: list[Tokens], image: int = image + lane) -> list[Row]:
            return [logprobs(image, sequence) for sequence in sequences]

        expected = constrained_beam_search(table, rules, constraints)
        assert [each.token_ids for each in captions] == [e.hypothesis.tokens for e in expected]
        scores = [each.score for each in captions]
        assert scores == pytest.approx([each.score for each in expected], rel=1e-5)
