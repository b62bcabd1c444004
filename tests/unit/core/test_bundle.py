"""What a bundle makes of a caller's options, and its form as JSON."""

from __future__ import annotations

import dataclasses

import pytest
from captionserve_server.core.bundle import Bundle
from captionserve_server.core.captions import CheckpointRules, SpecialTokens
from captionserve_server.core.confidence import Calibration
from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.options import DecodingOptions

GEOMETRY = DecoderGeometry(
    layers=1,
    heads=1,
    head_dim=4,
    image_tokens=5,
    grid_rows=2,
    grid_cols=2,
    encoder_width=4,
    vocabulary_size=300,
    max_positions=30,
)
RULES = CheckpointRules(
    forced_bos_token_id=4,
    forced_eos_token_id=(5, 6),
    begin_suppress_tokens=(7,),
    sequence_bias=(((1, 2), 3.5),),
    exponential_decay_length_penalty=(3, 1.5),
    renormalize_logits=True,
)
BUNDLE = Bundle(
    GEOMETRY,
    SpecialTokens(0, (1,)),
    DecodingOptions(max_new_tokens=9, min_new_tokens=2),
    Calibration(),
    RULES,
)


def encode(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(
    ("given", "longest", "shortest"),
    [
        ({}, 10, 3),
        ({"prefix": "abc"}, 13, 6),
        ({"prefix": "abc", "max_new_tokens": 4}, 8, 6),
        ({"prefix": "abc", "max_length": 12}, 12, 6),
        ({"min_length": 8, "max_new_tokens": 29}, 30, 8),
    ],
)
def test_new_tokens_are_counted_after_start_and_prefix(
    given: dict[str, object], longest: int, shortest: int
) -> None:
    plan = BUNDLE.plan(given, encode)
    assert (plan.options.max_length, plan.options.min_length) == (longest, shortest)
    assert plan.rules == RULES


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"max_new_tokens": 3, "max_length": 5}, {"max_new_tokens", "max_length"}),
        ({"min_new_tokens": 3, "min_length": 5}, {"min_new_tokens", "min_length"}),
        ({"min_new_tokens": 8, "max_new_tokens": 5}, {"min_new_tokens", "max_new_tokens"}),
        ({"max_new_tokens": 0}, {"max_new_tokens"}),
        ({"max_new_tokens": 255, "prefix": "abc"}, {"max_new_tokens"}),
        ({"max_new_tokens": 29, "prefix": "abc"}, {"max_new_tokens"}),
        (
            {"max_new_tokens": 3, "num_beams": 2, "force_words": ["abcd"]},
            {"max_new_tokens", "force_words"},
        ),
        ({"max_new_tokens": 255, "num_beams": 16}, {"max_new_tokens", "num_beams"}),
    ],
)
def test_lengths_that_cannot_be_are_refused_by_field(
    given: dict[str, object], fields: set[str]
) -> None:
    with pytest.raises(InvalidOptionsError) as caught:
        BUNDLE.plan(given, encode)
    assert set(caught.value.field_violations) == fields


def test_a_bad_word_as_long_as_the_caption_may_get_is_kept() -> None:
    word = "a" * 25
    plan = BUNDLE.plan({"max_new_tokens": 28, "bad_words": [word]}, encode)
    assert tuple(encode(word)) in plan.words.bad


@pytest.mark.parametrize("rules", [RULES, CheckpointRules()])
def test_json_gives_back_the_same(rules: CheckpointRules) -> None:
    bundle = dataclasses.replace(BUNDLE, rules=rules)
    assert Bundle.from_json(bundle.to_json()) == bundle
