"""Confidence and the signs of degenerate captions, by example and in general."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from captionserve_server.core.confidence import Calibration, is_degenerate
from captionserve_server.demo.captions import write_caption
from captionserve_server.demo.facts import BACKGROUND_COLOURS, ObjectFact, Relation, SceneFacts
from captionserve_server.demo.kinds import KINDS, colours_of
from hypothesis import assume, given
from hypothesis import strategies as st

token_logprobs = st.lists(st.floats(-50, 0), min_size=1, max_size=40)
calibrations = st.builds(
    Calibration, slope=st.floats(0, 100, exclude_min=True), intercept=st.floats(-100, 100)
)

words = st.text("abcdefgh", min_size=1, max_size=6)
objects = st.sampled_from(
    [ObjectFact(kind, colour) for kind in KINDS for colour in colours_of(kind)]
)
backgrounds = st.sampled_from(sorted(BACKGROUND_COLOURS))
scene_facts = st.builds(SceneFacts, objects, backgrounds) | st.builds(
    SceneFacts, objects, backgrounds, st.sampled_from(Relation), objects
)


def tokens_of(text: str) -> list[str]:
    """A token for each word, the space before it included."""
    first, *others = text.split(" ")
    return [first, *(f" {word}" for word in others)]


@given(token_logprobs)
def test_uncalibrated_confidence_is_the_geometric_mean_of_the_probabilities(
    logprobs: list[float],
) -> None:
    mean = math.prod(math.exp(logprob / len(logprobs)) for logprob in logprobs)
    assert Calibration().confidence(logprobs) == pytest.approx(mean, abs=2e-6)


def test_a_calibration_moves_the_log_odds() -> None:
    # Probabilities 0.8 and 0.45, of geometric mean 0.6: odds 3 to 2.
    logprobs = [math.log(0.8), math.log(0.45)]
    odds = math.exp(-1.0) * (3 / 2) ** 2
    confidence = Calibration(slope=2.0, intercept=-1.0).confidence(logprobs)
    assert confidence == pytest.approx(odds / (1 + odds))


@given(calibrations, token_logprobs, st.integers(min_value=0), st.floats(0, 50))
def test_a_likelier_token_never_lowers_the_confidence(
    calibration: Calibration, logprobs: list[float], which: int, added: float
) -> None:
    likelier = list(logprobs)
    likelier[which % len(logprobs)] = min(0.0, likelier[which % len(logprobs)] + added)
    before, after = calibration.confidence(logprobs), calibration.confidence(likelier)
    assert 0.0 <= before <= 1.0
    assert after >= before - 1e-12


@pytest.mark.parametrize("logprobs", [[0.0], [2e-7], [-1e9], [-math.inf, 0.0]])
@pytest.mark.parametrize("calibration", [Calibration(), Calibration(slope=1e300, intercept=-1e300)])
def test_the_ends_of_the_scale_give_a_confidence(
    calibration: Calibration, logprobs: list[float]
) -> None:
    assert 0.0 <= calibration.confidence(logprobs) <= 1.0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"slope": 0.0}, "slope"),
        ({"slope": -1.0}, "slope"),
        ({"slope": math.nan}, "slope"),
        ({"slope": math.inf}, "slope"),
        ({"intercept": math.nan}, "intercept"),
        ({"intercept": -math.inf}, "intercept"),
    ],
)
def test_what_gives_no_confidence_is_refused(values: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Calibration(**values)


@given(calibrations)
def test_json_round_trip(calibration: Calibration) -> None:
    assert Calibration.from_json(calibration.to_json()) == calibration


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1.0",
        "{}",
        '{"slope": 1.0}',
        '{"slope": 1.0, "intercept": 0.0, "bins": []}',
        '{"slope": "1.0", "intercept": 0.0}',
        '{"slope": true, "intercept": 0.0}',
        '{"slope": null, "intercept": 0.0}',
        '{"slope": [1.0], "intercept": 0.0}',
        '{"slope": -1.0, "intercept": 0.0}',
        '{"slope": NaN, "intercept": 0.0}',
        '{"slope": 1.0, "intercept": 1e999}',
        f'{{"slope": 1{"0" * 400}, "intercept": 0}}',
    ],
)
def test_malformed_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Calibration.from_json(text)


def test_whole_numbers_are_numbers() -> None:
    calibration = Calibration.from_json('{"slope": 2, "intercept": -3}')
    assert calibration == Calibration(slope=2.0, intercept=-3.0)


@pytest.mark.parametrize(
    "text",
    [
        "a man in a suit and tie in a suit and tie in a suit and tie",
        "close up of a close up of a close up of a hand holding a tree",
        "a cat laying on top of a bed next to a cat next to a cat next to a cat",
        "a woman with a woman with a woman with",
        "a dog a dog a dog",
        "A dog, a dog, a DOG.",
        "a dog dog dog in the grass",
        "the the the the the the",
        "a red bus on a street and a red bus by a tree with a red bus",
        "",
        "   ",
        "...",
        "\ufffd",
    ],
)
def test_known_failures_are_degenerate(text: str) -> None:
    assert is_degenerate(tokens_of(text), finished=True)


@pytest.mark.parametrize(
    "text",
    [
        "a man and a woman and a dog and a cat",
        "a very very big dog",
        "a man in a suit and tie standing next to a man in a suit and tie",
        "a man in a blue shirt and a woman in a red shirt and a boy in a green shirt",
        "a dog on a bed, a cat on a chair and a bird on a tree",
        "two dogs, two dogs",
        "two dogs side by side by side and two cats side by side",
        "dog",
        "a kitten's toy - a mouse",
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_ordinary_captions_are_not(text: str, finished: bool) -> None:
    assert not is_degenerate(tokens_of(text), finished)


@given(scene_facts)
def test_true_captions_of_the_demo_are_not_degenerate(facts: SceneFacts) -> None:
    assert not is_degenerate(tokens_of(write_caption(facts)), finished=True)


@given(
    st.lists(words, max_size=8),
    st.lists(words, min_size=1, max_size=6),
    st.integers(3, 5),
    st.lists(words, max_size=8),
)
def test_one_to_six_words_three_times_in_a_row_are_a_loop(
    before: list[str], loop: list[str], times: int, after: list[str]
) -> None:
    text = " ".join([*before, *(loop * times), *after])
    assert is_degenerate(tokens_of(text), finished=True)


@given(st.lists(words, min_size=3, max_size=5), st.lists(st.lists(words), min_size=2, max_size=4))
def test_a_phrase_in_three_places_is_a_loop(phrase: list[str], between: list[list[str]]) -> None:
    text = " ".join(phrase + [word for some in between for word in [*some, *phrase]])
    assert is_degenerate(tokens_of(text), finished=True)


@given(st.lists(words, min_size=1, max_size=40), st.booleans())
def test_words_of_which_none_occurs_three_times_are_no_loop(
    chosen: list[str], finished: bool
) -> None:
    assume(max(map(chosen.count, chosen)) < 3)
    assert not is_degenerate(tokens_of(" ".join(chosen)), finished)


@given(st.text("ab ,", max_size=40), st.lists(st.integers(0, 40)))
def test_how_a_finished_text_is_cut_into_tokens_does_not_matter(
    text: str, places: list[int]
) -> None:
    ends = [0, *sorted(places), len(text)]
    parts = [text[start:end] for start, end in pairwise(ends)]
    assert is_degenerate(parts, finished=True) == is_degenerate([text], finished=True)


@pytest.mark.parametrize(
    "token_texts",
    [
        ["a", " corg", "i"],
        ["a", " cor", "g", "i", ""],
        ["corg", "i"],
        ["a", " t", "-", "sh"],
        ["a", " dog", "'"],
        ["a", " caf\ufffd"],
        ["a", " ", "\ufffd"],
    ],
)
def test_only_an_unfinished_text_can_break_off_within_a_word(token_texts: list[str]) -> None:
    assert is_degenerate(token_texts, finished=False)
    assert not is_degenerate(token_texts, finished=True)


@pytest.mark.parametrize(
    "token_texts",
    [
        ["a", " dog"],
        ["a", "", " dog", ""],
        ["a", " corg", "i", " dog"],
        ["a", " ", "dog"],
        ["a", " corg", "i", "."],
        ["a", " corg", "i", " "],
    ],
)
def test_an_unfinished_text_may_end_with_a_word(token_texts: list[str]) -> None:
    assert not is_degenerate(token_texts, finished=False)
