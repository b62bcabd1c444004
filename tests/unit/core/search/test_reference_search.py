"""The reference searches: against generate() where it can do the same, else against definitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from captionserve_server.core.options import DecodingOptions

from tests.checkpoints import RANDOM_CHECKPOINTS
from tests.reference import ReferenceCaption, picture, reference
from tests.reference_search import (
    Completed,
    Constraint,
    Row,
    Rules,
    Tokens,
    constrained_beam_search,
    diverse_beam_search,
)

PLAIN_OPTIONS = [
    DecodingOptions(num_beams=2, max_length=14, num_return_sequences=2),
    DecodingOptions(num_beams=3, max_length=14, early_stopping=True, length_penalty=0.5),
    DecodingOptions(num_beams=4, max_length=12, early_stopping="never", length_penalty=2.0),
    DecodingOptions(
        num_beams=3, max_length=14, min_length=8, repetition_penalty=1.3, num_return_sequences=3
    ),
    DecodingOptions(
        num_beams=5, max_length=14, no_repeat_ngram_size=2, bad_words=("w", "di", "\u047d")
    ),
    DecodingOptions(
        num_beams=3, max_length=14, prefix="a 2", min_length=9, suppress_tokens=(67, 86, 141)
    ),
]

END = 0
LIKELY = Rules((9,), frozenset({END}), 1, 6, length_penalty=1.0, early_stopping=False)


def shares(*probabilities: float) -> Row:
    return np.log(np.array(probabilities, np.float32))


def ends_after_one(sequences: list[Tokens]) -> list[Row]:
    """A model that likes token 1 best and token 2 nearly as well, and then comes to an end."""
    first, then = shares(0.1, 0.5, 0.3, 0.1), shares(0.91, 0.03, 0.03, 0.03)
    return [first if len(sequence) == 1 else then for sequence in sequences]


def generated(completed: list[Completed]) -> list[Tokens]:
    return [caption.hypothesis.tokens for caption in completed]


def assert_equal(completed: list[Completed], expected: list[ReferenceCaption]) -> None:
    found = completed[: len(expected)]
    assert generated(found) == [true.token_ids for true in expected]
    for caption, true in zip(found, expected, strict=True):
        assert caption.score == pytest.approx(true.score, abs=1e-4)
        assert caption.hypothesis.logprobs == pytest.approx(true.token_logprobs, abs=1e-4)


@pytest.mark.parametrize("options", PLAIN_OPTIONS)
@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_without_anything_of_its_own_each_search_is_generates_beam_search(
    name: str, options: DecodingOptions, checkpoint_folder: Callable[[str], Path]
) -> None:
    truth = reference(checkpoint_folder(name))
    for seed in range(2):
        image = picture(seed)
        expected = truth.captions(image, options)
        logprobs, rules = truth.logprobs(image, options), truth.rules(options)

        one_group = diverse_beam_search(logprobs, rules, groups=1, diversity_penalty=1.0)
        unconstrained = constrained_beam_search(logprobs, rules, [])

        assert_equal(one_group, expected)
        assert_equal(unconstrained, expected)


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_under_a_large_penalty_groups_begin_with_tokens_of_their_own(
    name: str, checkpoint_folder: Callable[[str], Path]
) -> None:
    options = DecodingOptions(
        num_beams=4,
        max_length=14,
        min_length=3,
        num_return_sequences=4,
        num_beam_groups=4,
        diversity_penalty=100.0,
    )
    captions = reference(checkpoint_folder(name)).captions(picture(0), options)
    assert len({caption.token_ids[0] for caption in captions}) == 4


def test_a_later_group_pays_for_what_earlier_ones_go_on_with_but_not_for_their_ends() -> None:
    completed = diverse_beam_search(ends_after_one, LIKELY, groups=2, diversity_penalty=1.0)

    assert generated(completed) == [(1, END), (2, END)]
    paid = completed[1].hypothesis.logprobs
    assert paid == pytest.approx([np.log(0.3), np.log(0.91)])
    assert completed[1].score == pytest.approx(sum(paid) / 2)


def test_a_later_group_pays_for_the_last_tokens_of_earlier_ones_too() -> None:
    only_one_token = dataclasses.replace(LIKELY, longest=1)
    completed = diverse_beam_search(ends_after_one, only_one_token, groups=2, diversity_penalty=1.0)
    assert generated(completed) == [(1,), (2,)]


def test_a_token_that_is_taken_all_the_same_is_scored_with_its_penalty() -> None:
    completed = diverse_beam_search(ends_after_one, LIKELY, groups=3, diversity_penalty=0.1)

    assert generated(completed) == [(1, END)] * 3
    firsts = [caption.hypothesis.logprobs[0] for caption in completed]
    assert firsts == pytest.approx([np.log(0.5) - 0.1 * earlier for earlier in range(3)])


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
@pytest.mark.parametrize("prefix", ["", "a"])
@pytest.mark.parametrize("words", [("at",), ("at", "on"), ("a 2", "b", "3")])
def test_every_caption_contains_a_variant_of_every_word(
    name: str,
    prefix: str,
    words: tuple[str, ...],
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder(name))
    options = DecodingOptions(
        num_beams=5, max_length=14, num_return_sequences=5, force_words=words, prefix=prefix
    )
    captions = truth.captions(picture(0), options)
    assert captions
    for caption in captions:
        text = "".join(f"/{token}" for token in caption.token_ids) + "/"
        for spaced, initial in ((c.spaced, c.initial) for c in truth.constraints(options)):
            begins = initial is not None and caption.token_ids[: len(initial)] == initial
            assert begins or "".join(f"/{token}" for token in spaced) + "/" in text


def test_an_unlikely_constraint_is_met_before_the_end() -> None:
    unlikely = Constraint(spaced=(3, 2), initial=None)
    completed = constrained_beam_search(ends_after_one, LIKELY, [unlikely])
    assert generated(completed) == [(3, 2, END)]


def test_a_beam_that_would_rather_end_goes_on_until_its_constraints_are_met() -> None:
    def likes_to_end_after_token_one(sequences: list[Tokens]) -> list[Row]:
        rows: dict[Tokens, Row] = {
            (): shares(0.04, 0.01, 0.5, 0.45),
            (1,): shares(0.97, 0.01, 0.01, 0.01),
            (2,): shares(0.25, 0.25, 0.25, 0.25),
            (3,): shares(0.25, 0.25, 0.25, 0.25),
        }
        return [rows.get(sequence[1:], shares(0.91, 0.03, 0.03, 0.03)) for sequence in sequences]

    rules = Rules((9,), frozenset({END}), 3, 3, length_penalty=1.0, early_stopping=False)
    constraints = [Constraint(spaced=(token,), initial=None) for token in (2, 3)]

    completed = constrained_beam_search(likes_to_end_after_token_one, rules, constraints)

    # (1, 1) takes the lowest bank's beam after two tokens, which leaves none for (3, 2).
    assert generated(completed) == [(2, 3, END), (2, 3, 1), (2, 3, 2)]


def test_without_room_for_a_constraint_there_is_no_caption() -> None:
    too_long = Constraint(spaced=(1, 2, 1, 2, 1, 2, 1), initial=None)
    assert constrained_beam_search(ends_after_one, LIKELY, [too_long]) == []


@pytest.mark.parametrize(
    ("tokens", "progress", "advancing"),
    [
        ((), 0, {5, 6}),
        ((6,), 1, {5, 7}),
        ((6, 7), 2, {5, 8}),
        ((1, 6), 0, {5}),
        ((1, 5), 1, {6}),
        ((1, 5, 6), 2, {5}),
        ((1, 5, 6, 5), 3, {7}),
        ((5, 6, 5, 6), 2, {5}),
        ((5, 6, 5, 5), 1, {6}),
    ],
)
def test_progress_of_a_constraint(tokens: Tokens, progress: int, advancing: set[int]) -> None:
    constraint = Constraint(spaced=(5, 6, 5, 7), initial=(6, 7, 8))
    assert not constraint.is_met(tokens)
    assert constraint.progress(tokens) == progress
    assert constraint.advancing(tokens) == advancing


@pytest.mark.parametrize(
    ("tokens", "met"),
    [
        ((5, 6), True),
        ((1, 5, 6, 1), True),
        ((5, 1, 6), False),
        ((7, 8, 1), True),
        ((1, 7, 8), False),
        ((7,), False),
    ],
)
def test_the_bare_variant_counts_at_the_beginning_only(tokens: Tokens, met: bool) -> None:
    assert Constraint(spaced=(5, 6), initial=(7, 8)).is_met(tokens) == met
