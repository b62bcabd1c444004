"""Confidence and the signs of degenerate captions, by example and in general."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from captionserve_server.core.confidence import (
    SIGNALS,
    Calibration,
    Evidence,
    Logistic,
    SpokenWord,
    caption_signals,
    is_degenerate,
    spoken_words,
)
from captionserve_server.demo.captions import write_caption
from captionserve_server.demo.facts import BACKGROUND_COLOURS, ObjectFact, Relation, SceneFacts
from captionserve_server.demo.kinds import KINDS, colours_of
from hypothesis import assume, given
from hypothesis import strategies as st

token_logprobs = st.lists(st.floats(-50, 0), min_size=1, max_size=40)
numbers = st.floats(-100, 100)
positive = st.floats(0, 100, exclude_min=True)


def fits(name: str) -> st.SearchStrategy[Logistic]:
    """Any fit of a calibration's."""
    others = dict.fromkeys(SIGNALS[name], numbers)
    return st.builds(Logistic, numbers, st.fixed_dictionaries(others | {"log_odds": positive}))


IMAGE_STATE = [0.5, -2.0, 1.0]
calibrations = st.builds(
    Calibration,
    fits("caption"),
    fits("word"),
    st.none() | fits("grounded_caption"),
    st.none() | fits("grounded_word"),
    st.dictionaries(st.text(max_size=5), numbers, max_size=5),
    st.tuples(*[numbers] * len(IMAGE_STATE)),
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


def evidence(logprobs: list[float], groundings: list[float] | None = None) -> Evidence:
    """Of a caption whose tokens are words."""
    spoken = [SpokenWord(f"word {number}", number, 1) for number in range(len(logprobs))]
    return Evidence(logprobs, spoken, groundings, IMAGE_STATE if groundings else ())


@given(token_logprobs)
def test_uncalibrated_confidence_is_the_geometric_mean_of_the_probabilities(
    logprobs: list[float],
) -> None:
    mean = math.prod(math.exp(logprob / len(logprobs)) for logprob in logprobs)
    confidence = Calibration().caption_confidence(evidence(logprobs))
    assert confidence == pytest.approx(mean, abs=2e-6)


@given(token_logprobs, st.integers(0, 39), st.integers(1, 40))
def test_uncalibrated_confidence_in_a_word_is_the_product_of_its_tokens_probabilities(
    logprobs: list[float], first: int, count: int
) -> None:
    assume(first < len(logprobs))
    word = SpokenWord("word", first, count)
    product = math.prod(map(math.exp, logprobs[word.own]))
    confidence = Calibration().word_confidence(evidence(logprobs), word)
    assert confidence == pytest.approx(product, abs=1.1e-4)


def test_a_fit_moves_the_log_odds() -> None:
    # Probabilities 0.8 and 0.45, of geometric mean 0.6: odds 3 to 2.
    logprobs = [math.log(0.8), math.log(0.45)]
    odds = math.exp(-1.0) * (3 / 2) ** 2
    calibration = Calibration(caption=Logistic(-1.0, {"log_odds": 2.0}))
    assert calibration.caption_confidence(evidence(logprobs)) == pytest.approx(odds / (1 + odds))


def test_groundings_count_where_they_are_known_and_something_was_fitted_to_them() -> None:
    plain, asked = evidence([-0.1, -0.2]), evidence([-0.1, -0.2], [1.0, 3.0])
    word = asked.words[1]
    unfitted = Calibration()
    assert unfitted.caption_confidence(asked) == unfitted.caption_confidence(plain)
    assert unfitted.word_confidence(asked, word) == unfitted.word_confidence(plain, word)
    fitted = Calibration(
        grounded_caption=Logistic(
            0.0, {"log_odds": 1.0, "grounding": 0.25, "least_grounding": -2.0}
        ),
        grounded_word=Logistic(0.0, {"log_odds": 1.0, "grounding": 0.5}),
    )
    assert fitted.caption_confidence(plain) == unfitted.caption_confidence(plain)
    assert fitted.word_confidence(plain, word) == unfitted.word_confidence(plain, word)
    # 0.25 x the mean 2 - 2 x the least 1; 0.5 x 3.
    before = unfitted.caption_confidence(plain)
    odds = before / (1 - before) * math.exp(-1.5)
    assert fitted.caption_confidence(asked) == pytest.approx(odds / (1 + odds))
    before = unfitted.word_confidence(plain, word)
    odds = before / (1 - before) * math.exp(1.5)
    assert fitted.word_confidence(asked, word) == pytest.approx(odds / (1 + odds))


def test_the_image_counts_where_captions_are_grounded() -> None:
    plain, asked = evidence([-0.1, -0.2]), evidence([-0.1, -0.2], [1.0, 3.0])
    fit = Logistic(0.0, {"log_odds": 1.0, "image": 2.0})
    fitted = Calibration(grounded_caption=fit, image=(1.0, 0.25, 3.0))
    before = Calibration().caption_confidence(plain)
    assert fitted.caption_confidence(plain) == before
    # 2 x (1 x 0.5 - 0.25 x 2 + 3 x 1).
    odds = before / (1 - before) * math.exp(6.0)
    assert fitted.caption_confidence(asked) == pytest.approx(odds / (1 + odds))
    word = asked.words[0]
    assert fitted.word_confidence(asked, word) == Calibration().word_confidence(asked, word)


def test_weights_for_images_of_another_encoder_are_no_confidence() -> None:
    fit = Logistic(0.0, {"log_odds": 1.0, "image": 1.0})
    fitted = Calibration(grounded_caption=fit, image=(1.0, 2.0))
    with pytest.raises(ValueError, match="longer"):
        fitted.caption_confidence(evidence([-0.1], [1.0]))


@pytest.mark.parametrize(
    ("image", "named"), [((), "image"), ((1.0, math.nan), "image"), ((2e6,), "image")]
)
def test_an_image_that_gives_no_confidence_is_refused(image: tuple[float, ...], named: str) -> None:
    fit = Logistic(0.0, {"log_odds": 1.0, "image": 1.0})
    with pytest.raises(ValueError, match=named):
        Calibration(grounded_caption=fit, image=image)


def test_words_have_their_records_in_any_case_and_others_that_of_the_unseen() -> None:
    records = {"dog": 1.5, "": -0.5}
    fit = Logistic(0.0, {"log_odds": 1.0, "record": 2.0})
    calibration = Calibration(word=fit, records=records)
    asked = evidence([-0.5])
    found = {
        text: math.log(confidence / (1 - confidence))
        for text in ("dog", "Dog", "cat")
        for confidence in [calibration.word_confidence(asked, SpokenWord(text, 0, 1))]
    }
    assert found["dog"] == found["Dog"] == pytest.approx(found["cat"] + 2 * 2.0)
    assert Calibration().record(SpokenWord("dog", 0, 1)) == 0.0
    # Of a caption: the log-probability that all are right, were each as often as it has been.
    both = Evidence([-0.5], [SpokenWord("dog", 0, 1), SpokenWord("cat", 0, 1)])
    right = 1 / (1 + math.exp(-1.5)) / (1 + math.exp(0.5))
    assert caption_signals(both, calibration.record)["record"] == pytest.approx(math.log(right))


@given(
    calibrations,
    token_logprobs,
    st.integers(min_value=0),
    st.floats(0, 50),
    st.booleans(),
)
def test_a_likelier_token_never_lowers_the_confidence(
    calibration: Calibration, logprobs: list[float], which: int, added: float, grounded: bool
) -> None:
    likelier = list(logprobs)
    likelier[which % len(logprobs)] = min(0.0, likelier[which % len(logprobs)] + added)
    groundings = [1.0] * len(logprobs) if grounded else None
    before = calibration.caption_confidence(evidence(logprobs, groundings))
    after = calibration.caption_confidence(evidence(likelier, groundings))
    assert 0.0 <= before <= 1.0
    assert after >= before - 1e-12


EXTREME = Logistic(-1e6, {"log_odds": 1e6})


@pytest.mark.parametrize("logprobs", [[0.0], [2e-7], [-1e9], [-math.inf, 0.0]])
@pytest.mark.parametrize("calibration", [Calibration(), Calibration(EXTREME, EXTREME)])
def test_the_ends_of_the_scale_give_a_confidence(
    calibration: Calibration, logprobs: list[float]
) -> None:
    asked = evidence(logprobs)
    assert 0.0 <= calibration.caption_confidence(asked) <= 1.0
    assert 0.0 <= calibration.word_confidence(asked, asked.words[0]) <= 1.0


@pytest.mark.parametrize(
    ("intercept", "weights", "named"),
    [
        (0.0, {"log_odds": 0.0}, "log_odds"),
        (0.0, {"log_odds": -1.0}, "log_odds"),
        (0.0, {"log_odds": math.nan}, "log_odds"),
        (0.0, {"log_odds": 2e6}, "log_odds"),
        (0.0, {}, "log_odds"),
        (0.0, {"log_odds": 1.0, "grounding": math.inf}, "grounding"),
        (math.nan, {"log_odds": 1.0}, "intercept"),
        (-math.inf, {"log_odds": 1.0}, "intercept"),
    ],
)
def test_what_gives_no_confidence_is_refused(
    intercept: float, weights: dict[str, float], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Logistic(intercept, weights)


@given(calibrations)
def test_json_round_trip(calibration: Calibration) -> None:
    assert Calibration.from_json(calibration.to_json()) == calibration


PLAIN = '{"intercept": 0.0, "log_odds": 1.0}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1.0",
        "{}",
        f'{{"caption": {PLAIN}, "word": {PLAIN}}}',
        f'{{"caption": {PLAIN}, "records": {{}}}}',
        f'{{"caption": {PLAIN}, "word": {PLAIN}, "records": {{}}, "bins": {{}}}}',
        f'{{"caption": {PLAIN}, "word": [], "records": {{}}}}',
        f'{{"caption": {PLAIN}, "word": {PLAIN}, "records": []}}',
        f'{{"caption": {PLAIN}, "word": {PLAIN}, "records": {{"dog": "often"}}}}',
        f'{{"caption": {PLAIN}, "word": {PLAIN}, "records": {{"dog": NaN}}}}',
        f'{{"caption": {PLAIN}, "word": {{"log_odds": 1.0}}, "records": {{}}}}',
        *(
            f'{{"caption": {PLAIN}, "word": {PLAIN}, "records": {{}}, "image": {image}}}'
            for image in ("{}", "1.0", '["1.0"]', "[[1.0]]", "[NaN]", "[1e7]", "null")
        ),
        f'{{"caption": {PLAIN}, "word": {PLAIN}, "records": {{}}, "image": [], '
        '"grounded_caption": {"intercept": 0.0, "log_odds": 1.0, "image": 1.0}}',
        f'{{"caption": {PLAIN}, "word": {{"intercept": 1.0}}, "records": {{}}}}',
        # A signal that there is, but not of captions without groundings.
        f'{{"caption": {PLAIN[:-1]}, "grounding": 1.0}}, "word": {PLAIN}, "records": {{}}}}',
        *(
            f'{{"caption": {PLAIN}, "records": {{}}, "word": {{"intercept": {intercept}, '
            f'"log_odds": {weight}}}}}'
            for intercept, weight in (
                ("0.0", '"1.0"'),
                ("0.0", "true"),
                ("null", "1.0"),
                ("0.0", "[1.0]"),
                ("0.0", "-1.0"),
                ("0.0", "NaN"),
                ("1e999", "1.0"),
                ("0", "1" + "0" * 400),
            )
        ),
    ],
)
def test_malformed_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Calibration.from_json(text)


def test_the_file_of_an_older_version_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="older captionserve; `captionserve calibrate` writes"):
        Calibration.from_json('{"slope": 0.876, "intercept": -4.38}')


def test_whole_numbers_are_numbers() -> None:
    fit = '{"intercept": -3, "log_odds": 2}'
    calibration = Calibration.from_json(f'{{"caption": {fit}, "word": {fit}, "records": {{}}}}')
    expected = Logistic(-3.0, {"log_odds": 2.0})
    assert calibration == Calibration(expected, expected)


@pytest.mark.parametrize(
    ("token_texts", "expected"),
    [
        (["a", " red", " apple", ""], [("a", 0, 1), ("red", 1, 1), ("apple", 2, 1)]),
        (["a", " pen", "gu", "in", "."], [("a", 0, 1), ("penguin", 1, 3)]),
        (["a red", " apple"], [("a", 0, 1), ("red", 0, 1), ("apple", 1, 1)]),
        ([" man", "'", "s", " hat"], [("man's", 0, 3), ("hat", 3, 1)]),
        # A character of two tokens is the second one's.
        (["caf", "", "\u00e9", "!"], [("caf\u00e9", 0, 3)]),
        (["", "", "dog"], [("dog", 2, 1)]),
        (["dog", "", " cat", ""], [("dog", 0, 1), ("cat", 2, 1)]),
        ([" ", "...", ""], []),
        ([], []),
    ],
)
def test_words_know_their_tokens(
    token_texts: list[str], expected: list[tuple[str, int, int]]
) -> None:
    found = spoken_words(token_texts)
    assert [(word.text, word.first_token, word.tokens) for word in found] == expected


@given(st.lists(st.text("ab '.\u00e9", max_size=4), max_size=12))
def test_each_word_is_in_the_text_of_its_tokens_and_not_in_that_of_fewer(
    token_texts: list[str],
) -> None:
    for word in spoken_words(token_texts):
        own = token_texts[word.own]
        assert word.text in "".join(own)
        assert own[0]
        assert own[-1]
        for fewer in (own[1:], own[:-1]):
            assert len("".join(fewer)) < len("".join(own))


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
