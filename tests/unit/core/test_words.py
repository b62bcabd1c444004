"""Words of the options as tokens."""

from __future__ import annotations

import pytest
from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.words import (
    NO_WORDS,
    ForcedWord,
    WordTokens,
    check_tokens,
    word_tokens,
)


def encode(text: str) -> list[int]:
    """One token for each character."""
    return [ord(character) for character in text]


def test_bad_words_are_banned_with_and_without_a_leading_space() -> None:
    words = word_tokens(DecodingOptions(bad_words=("ab", " ab ", "c")), encode)
    assert words.bad == ((97, 98), (32, 97, 98), (99,), (32, 99))


def test_forced_words_may_begin_a_caption_without_a_space_unless_a_prefix_does() -> None:
    options = DecodingOptions(num_beams=2, force_words=("ab",))
    assert word_tokens(options, encode).forced == (ForcedWord((32, 97, 98), (97, 98)),)
    prefixed = DecodingOptions(num_beams=2, force_words=("ab",), prefix="x ")
    words = word_tokens(prefixed, encode)
    assert words == WordTokens(prefix=(120,), forced=(ForcedWord((32, 97, 98), None),))


def test_no_words_are_no_tokens() -> None:
    assert word_tokens(DecodingOptions(), encode) == NO_WORDS


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (DecodingOptions(prefix="x" * 20), {"prefix", "max_length"}),
        (DecodingOptions(prefix="x" * 400), {"prefix", "max_length"}),
        (
            DecodingOptions(num_beams=2, force_words=("abcdef", "ghijkl"), max_length=14),
            {"force_words", "max_length"},
        ),
        (
            DecodingOptions(num_beams=2, force_words=("abcd",), prefix="x" * 12, max_length=16),
            {"force_words", "max_length"},
        ),
    ],
)
def test_words_that_find_no_room_are_refused(options: DecodingOptions, fields: set[str]) -> None:
    with pytest.raises(InvalidOptionsError) as caught:
        word_tokens(options, encode)
    assert set(caught.value.field_violations) == fields


def test_words_that_just_fit_are_taken() -> None:
    assert word_tokens(DecodingOptions(prefix="x" * 19), encode).prefix == (120,) * 19
    word_tokens(DecodingOptions(num_beams=2, force_words=("abcdef",), max_length=8), encode)


@pytest.mark.parametrize(
    ("prefix", "left"),
    [("ab", []), ("ab c", []), ("x ab c", []), ("xab", ["ab"]), ("a", ["ab"]), ("x abc", [])],
)
def test_a_forced_word_that_the_prefix_has_counts_as_met(prefix: str, left: list[str]) -> None:
    options = DecodingOptions(num_beams=2, force_words=("ab",), prefix=prefix, max_length=40)
    words = word_tokens(options, encode)
    assert words.forced == tuple(ForcedWord(tuple(encode(f" {word}")), None) for word in left)


def test_what_the_prefix_has_takes_no_room() -> None:
    options = DecodingOptions(num_beams=2, force_words=("abcdef",), prefix="abcdef", max_length=8)
    assert word_tokens(options, encode).forced == ()


def test_a_banned_word_that_no_caption_has_room_for_is_not_looked_for() -> None:
    options = DecodingOptions(bad_words=("x" * 8, "y" * 9), max_length=9)
    assert {len(run) for run in word_tokens(options, encode).bad} == {8, 9}


@pytest.mark.parametrize("name", ["prefix", "bad_words", "force_words"])
def test_a_token_beyond_the_vocabulary_is_refused_by_field(name: str) -> None:
    value = "z" if name == "prefix" else ("ab", "z")
    options = DecodingOptions().with_given({"num_beams": 2, name: value})
    words = word_tokens(options, encode)
    check_tokens(words, ord("z") + 1)
    with pytest.raises(InvalidOptionsError) as caught:
        check_tokens(words, ord("z"))
    assert set(caught.value.field_violations) == {name}


def test_a_word_without_tokens_cannot_be_forced_and_needs_no_ban() -> None:
    def letters_only(text: str) -> list[int]:
        return [token for token in encode(text) if token > ord(" ")]

    def nothing(text: str) -> list[int]:
        return []

    assert word_tokens(DecodingOptions(bad_words=("ab",)), letters_only).bad == ((97, 98),)
    assert word_tokens(DecodingOptions(bad_words=("ab",)), nothing).bad == ()
    with pytest.raises(InvalidOptionsError) as caught:
        word_tokens(DecodingOptions(num_beams=2, force_words=("ab",)), nothing)
    assert set(caught.value.field_violations) == {"force_words"}
