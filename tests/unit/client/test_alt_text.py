"""Alt text: what is left out of a caption, what is kept of it, and what is warned of."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import regex
from captionserve import AltText, AltTextWarning, Caption, CaptionResult, FinishReason
from captionserve._alt_text import alt_text_of
from captionserve._graphemes import beginning
from captionserve_server.local import FinishedCaption, LocalResult
from hypothesis import example, given
from hypothesis import strategies as st

W = AltTextWarning
LONG = (
    "a woman in a red coat sitting on a bench in the park next to the statue of a man and a horse"
)


@dataclass(frozen=True)
class Said:
    """What a caption is to alt text."""

    text: str
    confidence: float = 0.9
    degenerate: bool = False


def alt(text: str, **more: Any) -> AltText:
    """The alt text of a caption that can be relied on."""
    return alt_text_of(Said(text), **more)


@pytest.mark.parametrize(
    ("caption", "text", "removed"),
    [
        ("a man riding a horse", "A man riding a horse", []),
        ("an image of a dog on grass", "A dog on grass", ["an image of"]),
        ("A Picture of two dogs", "Two dogs", ["A Picture of"]),
        ("close up of a red flower", "A red flower", ["close up of"]),
        ("a close-up view of a bee", "A bee", ["a close-up view of"]),
        ("photos of a birthday party", "A birthday party", ["photos of"]),
        (
            "a close up photo of a picture of a brown horse",
            "A brown horse",
            ["a close up photo of", "a picture of"],
        ),
        ("this image shows a street at night", "A street at night", ["this image shows"]),
        ("it's a photograph that shows snow", "Snow", ["it's a photograph that shows"]),
        ("in this picture, a boy runs", "A boy runs", ["in this picture,"]),
        ("in the image we can see a boy", "A boy", ["in the image we can see"]),
        ("an image of: a boat", "A boat", ["an image of"]),
        # What is no opening, or says something.
        ("a black and white photo of a cat", "A black and white photo of a cat", []),
        ("a painting of a ship", "A painting of a ship", []),
        ("a shot of espresso", "A shot of espresso", []),
        ("a picture frame on a wall", "A picture frame on a wall", []),
        ("in the picture frame is a cat", "In the picture frame is a cat", []),
        ("a man with a photo of a dog", "A man with a photo of a dog", []),
        ("a photo of", "A photo of", []),
        ("an image of ...", "An image of", []),
    ],
)
def test_opening_phrases_are_left_out_and_reported(
    caption: str, text: str, removed: list[str]
) -> None:
    found = alt(caption)
    assert (str(found), found.text, found.removed) == (text, text, tuple(removed))


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("a NASA rocket by the USB port", "A NASA rocket by the USB port"),
        ("An Image of A Man With A USB Stick", "A man with a USB stick"),
        ("A MAN RIDING A HORSE", "A man riding a horse"),
        ("NASA HQ", "NASA HQ"),
        ("New York City", "New York City"),
        ("vitamin A", "Vitamin A"),
        ("a bridge in New York", "A bridge in New York"),
        ("iPhone on a table", "iPhone on a table"),
        ("'stop' on a sign", "'Stop' on a sign"),
        ("2 dogs in snow", "2 dogs in snow"),
        ("éclairs on a plate", "Éclairs on a plate"),
        ("ßtrange letters", "ßtrange letters"),
    ],
)
def test_a_sentence_begins_with_a_capital_and_keeps_acronyms(caption: str, text: str) -> None:
    assert str(alt(caption)) == text


@pytest.mark.parametrize(
    ("caption", "text", "unfinished"),
    [
        ("  a dog\n on\t\tgrass . ", "A dog on grass", False),
        ("a dog , a cat .", "A dog, a cat", False),
        ("- . a dog", "A dog", False),
        (".22 rifles on a rack", ".22 rifles on a rack", False),
        ("the flag of the U.S.", "The flag of the U.S.", False),
        ("is this a dog?", "Is this a dog?", False),
        ("a man in a red shirt and a", "A man in a red shirt", True),
        ("a man walking with the", "A man walking", True),
        ("a dog and -", "A dog", True),
        ("a sign with the letter a", "A sign with the letter a", False),
        ("people looking on", "People looking on", False),
        ("...", "...", False),
    ],
)
def test_the_end_is_tidy(caption: str, text: str, unfinished: bool) -> None:
    found = alt(caption)
    assert str(found) == text
    assert (W.UNFINISHED in found.warnings) is unfinished
    assert not found.truncated


@pytest.mark.parametrize(
    ("max_chars", "text"),
    [
        (len(LONG), LONG),
        (
            len(LONG) - 1,
            "a woman in a red coat sitting on a bench in the park next to the statue of a man",
        ),
        (60, "a woman in a red coat sitting on a bench in the park"),
        (30, "a woman in a red coat sitting"),
        (29, "a woman in a red coat sitting"),
        (28, "a woman in a red coat"),
        (11, "a woman"),
        (1, "a"),
    ],
)
def test_a_long_caption_is_cut_where_a_phrase_ends(max_chars: int, text: str) -> None:
    found = alt(LONG, max_chars=max_chars)
    assert str(found) == "A" + text[1:]
    assert found.truncated is (text != LONG)


GRAPHEMES = {
    "mark": "e\u0301\u0323",
    "family": "👩\u200d👩\u200d👧",
    "skin tone": "👋🏽",
    "flag": "🇩🇪",
    "flag of tags": "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "keycap": "1\ufe0f\u20e3",
    "conjunct": "\u0915\u094d\u0937",
    "jamo": "\u1100\u1161\u11a8",
    "jamo and syllable": "\u1100\uac00",
    "Thai vowel": "\u0e01\u0e33",
    "prepended": "\u0600\u0661",
}


@pytest.mark.parametrize("grapheme", GRAPHEMES.values(), ids=GRAPHEMES)
def test_a_word_that_is_too_long_is_cut_between_graphemes(grapheme: str) -> None:
    for more in range(len(grapheme)):
        assert beginning(grapheme * 3, 2 * len(grapheme) + more) == grapheme * 2
    # No beginning of it is short enough.
    assert beginning(grapheme, 1) == grapheme[:1]


def test_a_cut_word_ends_with_no_hyphen() -> None:
    assert str(alt("skate-boarders", max_chars=6)) == "Skate"


def test_little_confidence_is_said_and_can_be_chosen() -> None:
    unsure = Said("a picture of a brown dog", confidence=0.49)
    found = alt_text_of(unsure)
    assert (str(found), found.hedged) == ("Possibly a brown dog", True)
    assert found.warnings == (W.LOW_CONFIDENCE,)
    assert str(alt_text_of(Said("A brown dog", 0.1))) == "Possibly a brown dog"
    assert str(alt_text_of(Said("NASA rockets", 0.1))) == "Possibly NASA rockets"
    assert str(alt_text_of(Said("perhaps a brown dog", 0.1))) == "Perhaps a brown dog"
    for sure in (alt_text_of(Said(unsure.text, 0.5)), alt_text_of(unsure, hedge_below=0.0)):
        assert (str(sure), sure.hedged, sure.warnings) == ("A brown dog", False, ())
    assert alt_text_of(Said("a brown dog", 0.9), hedge_below=1.0).hedged


def test_a_hedge_counts_and_takes_half_of_the_room_at_most() -> None:
    unsure = Said("skateboards and a ramp in a park", confidence=0.1)
    assert str(alt_text_of(unsure, max_chars=31)) == "Possibly skateboards and a ramp"
    assert str(alt_text_of(unsure, max_chars=30)) == "Possibly skateboards"
    short = alt_text_of(unsure, max_chars=17)
    assert (str(short), short.hedged) == ("Skateboards", False)
    assert W.LOW_CONFIDENCE in short.warnings


@pytest.mark.parametrize(
    ("caption", "more", "warning"),
    [
        ("a dog", {}, W.TOO_SHORT),
        ("", {}, W.TOO_SHORT),
        ("an image of a dog", {}, W.TOO_SHORT),
        ("IMG_1234.JPG", {}, W.FILE_NAME),
        ("a file dog.jpeg on grass", {}, W.FILE_NAME),
        ("dsc 00012", {}, W.FILE_NAME),
        ("photo 3", {}, W.FILE_NAME),
        ("brown_dog_beach", {}, W.FILE_NAME),
        ("a brown dog", {"file_name": "pictures/A-Brown_dog.webp"}, W.FILE_NAME),
        ("a brown dog", {"nearby_text": "Brown Dogs!"}, W.REPEATS_NEARBY_TEXT),
        (
            "a brown dog on a beach",
            {"nearby_text": "Summer. Our dog, brown as ever, at the beach of Rimini, 2019."},
            W.REPEATS_NEARBY_TEXT,
        ),
    ],
)
def test_what_somebody_should_look_at_is_warned_of(
    caption: str, more: dict[str, str], warning: AltTextWarning
) -> None:
    assert warning in alt(caption, **more).warnings


@pytest.mark.parametrize(
    ("caption", "more"),
    [
        ("a brown dog", {}),
        ("a brown dog", {"file_name": "IMG_1.jpg", "nearby_text": ""}),
        ("a photo album on a table", {}),
        ("a brown dog", {"file_name": "dog.jpg", "nearby_text": "Our dog Rex on holiday."}),
        # All words are somewhere in it, which repeats nothing.
        (
            "a brown dog on a beach",
            {"nearby_text": "The beach. " + "Nothing of it here at all, " * 9 + "brown dogs."},
        ),
    ],
)
def test_a_good_alt_text_is_not_warned_of(caption: str, more: dict[str, str]) -> None:
    assert alt(caption, **more).warnings == ()


def test_what_the_service_knows_of_a_caption_is_passed_on() -> None:
    @dataclass(frozen=True)
    class Reviewed(Said):
        needs_review: bool = True

    assert alt_text_of(Said("a brown dog", degenerate=True)).warnings == (W.DEGENERATE,)
    assert alt_text_of(Reviewed("a brown dog")).warnings == (W.NEEDS_REVIEW,)


def test_a_warning_is_its_stable_word() -> None:
    assert [f"{each}" for each in W] == [each.value for each in W]
    assert "too_short" in alt("a dog").warnings


@pytest.mark.parametrize("wrong", [0, -1])
def test_a_length_of_nothing_is_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="max_chars must be 1 or more"):
        alt("a dog", max_chars=wrong)


@pytest.mark.parametrize("wrong", [True, 12.0, "125", None])
def test_a_length_of_another_type_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="max_chars must be a whole number"):
        alt("a dog", max_chars=wrong)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_a_confidence_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="hedge_below must be from 0 to 1"):
        alt("a dog", hedge_below=wrong)


BEST = Caption(
    "a photo of a brown dog", -0.1, (1,), (-0.1,), FinishReason.EOS, ("a",), 0.2, False, None
)


def test_it_is_of_the_best_caption_of_a_result() -> None:
    other = dataclasses.replace(BEST, text="a cat")
    result = CaptionResult((BEST, other), model_version=1, cached=False)
    assert result.alt_text() == alt_text_of(BEST)
    given_all = result.alt_text(14, "brown dog", "abrowndog.jpg", 0.1)
    assert given_all == alt_text_of(BEST, 14, "brown dog", "abrowndog.jpg", 0.1)
    assert given_all.warnings == (W.FILE_NAME, W.REPEATS_NEARBY_TEXT)


def test_the_edge_mode_gives_the_same() -> None:
    shared = {field.name for field in dataclasses.fields(FinishedCaption)}
    values = {name: value for name, value in vars(BEST).items() if name in shared}
    finished = FinishedCaption(**values | {"finish_reason": "eos"})
    result = LocalResult((finished,), model_version=1)
    assert result.alt_text(14, "brown dog", "abrowndog.jpg", 0.1) == alt_text_of(
        BEST, 14, "brown dog", "abrowndog.jpg", 0.1
    )
    assert result.alt_text() == alt_text_of(BEST)
    ours, clients = (inspect.signature(each.alt_text) for each in (LocalResult, CaptionResult))
    assert list(ours.parameters.values()) == list(clients.parameters.values())


# Texts of any code points, surrogates too, and texts of words that mean something to the code.
WORDS = (
    *("a", "A", "an", "the", "The", "of", "Of", "and", "AND", "with", "image", "Picture", "photo"),
    *("shows", "this", "in", "close", "up", "close-up", "possibly", "Maybe", "dog", "Dogs", "NASA"),
    *(
        "iPhone",
        "U.S.",
        ".",
        ",",
        "...",
        "-",
        "(",
        '"the',
        "\u017fhows",
        "\u0131n",
        "İ",
        "ß",
        "ﬁsh",
        "ǆ",
    ),
    *(
        "e\u0301",
        "👩‍👩‍👧‍👦",
        "🇩🇪🇫🇷",
        "क्षि",
        "각",
        "a" * 30,
        "\x1f",
        "\u00a0",
        "2",
        "_",
        "IMG_1.jpg",
    ),
)
ANY_TEXT = st.text(st.characters())
WORDY_TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
TEXTS = ANY_TEXT | WORDY_TEXT
SAID = st.builds(Said, TEXTS, st.floats(0, 1))
LENGTHS = st.integers(1, 40) | st.just(125)


@given(SAID, LENGTHS, TEXTS, TEXTS)
@example(Said("The Lord Of Rings fan"), 17, "", "")
@example(Said("dog A"), 40, "", "")
@example(Said("ONE \u0130 OF IT"), 11, "", "")
@example(Said("Vitamin A", 0.1), 40, "", "")
@example(Said("the", 0.1), 40, "", "")
@example(Said("The Lord", 0.1), 40, "", "")
def test_any_caption_has_an_alt_text_that_keeps_to_its_length_and_is_its_own(
    said: Said, max_chars: int, nearby_text: str, file_name: str
) -> None:
    found = alt_text_of(said, max_chars, nearby_text, file_name)
    assert len(found.text) <= max_chars
    assert bool(found.text) is bool(said.text.strip())
    assert found.text == found.text.strip()
    again = alt_text_of(dataclasses.replace(said, text=found.text), max_chars)
    assert (again.text, again.hedged, again.truncated) == (found.text, found.hedged, False)
    assert again.removed == ()


@given(WORDY_TEXT | st.text(st.characters(codec="utf-8")), st.integers(1, 30))
def test_a_cut_is_one_that_unicode_allows(text: str, most: int) -> None:
    cut = beginning(text, most)
    assert text.startswith(cut)
    assert len(cut) <= most
    graphemes = regex.findall(r"\X", text)
    ends = {0}
    for grapheme in graphemes:
        ends.add(max(ends) + len(grapheme))
    if graphemes and len(graphemes[0]) <= most:
        assert len(cut) in ends
        assert cut
    elif text:
        assert cut == text[:most]
