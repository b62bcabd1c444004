"""Where a text may be cut without breaking what a reader sees as one character.

The standard library does not know grapheme clusters. These rules are those of Unicode's annex 29,
simplified to the safe side: every place they allow is one that it allows.
"""

from __future__ import annotations

import unicodedata

# Letters and symbols that go on with what stands before them, beside all marks and format
# characters: vowels of Thai and Lao, Katakana's voiced marks, skin tones.
_GO_ON = frozenset("\u0e33\u0eb3\uff9e\uff9f\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
_GO_ON_CATEGORIES = frozenset({"Mn", "Mc", "Me", "Cf"})
# What goes on with what stands behind it.
_PREPENDED = frozenset(
    "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\u1cf5\u1cf6"
    "\U000110bd\U000110cd\U000111c2\U000111c3\U0001193f\U00011941\U00011a3a\U00011a84\U00011a85"
    "\U00011a86\U00011a87\U00011a88\U00011a89\U00011d46\U00011f02"
)
_ZERO_WIDTH_JOINER = "\u200d"
_VIRAMA = 9  # The combining class of what joins two consonants.
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_HANGUL_LEADING = (range(0x1100, 0x1160), range(0xA960, 0xA980))
_HANGUL_FOLLOWING = (range(0x1160, 0x1200), range(0xD7B0, 0xD800))
_HANGUL_SYLLABLES = range(0xAC00, 0xD7A4)


def beginning(text: str, most: int) -> str:
    """The longest beginning that ends between two graphemes.

    Args:
        text: any text.
        most: of how many code points, at least 1; where the first grapheme alone has more, only
            cutting it keeps to that.
    """
    if len(text) <= most:
        return text
    place = most
    while place and not _may_cut(text, place):
        place -= 1
    return text[: place or most]


def _may_cut(text: str, place: int) -> bool:
    """Whether a text may end before the character at `place`, which is neither 0 nor its end."""
    before, after = text[place - 1], text[place]
    if after in _GO_ON or (
        unicodedata.category(after) in _GO_ON_CATEGORIES and after not in _PREPENDED
    ):
        return False
    if before in _PREPENDED or before == _ZERO_WIDTH_JOINER:
        return False
    if unicodedata.combining(before) == _VIRAMA:
        return False
    if ord(after) in _REGIONAL_INDICATORS:
        return _regional_indicators_before(text, place) % 2 == 0
    return not _within_hangul_syllable(ord(before), ord(after))


def _regional_indicators_before(text: str, place: int) -> int:
    """How many stand right before `place`; two are a flag."""
    begin = place
    while begin and ord(text[begin - 1]) in _REGIONAL_INDICATORS:
        begin -= 1
    return place - begin


def _within_hangul_syllable(before: int, after: int) -> bool:
    if any(after in each for each in _HANGUL_FOLLOWING):
        return True
    leading = any(before in each for each in _HANGUL_LEADING)
    return leading and (
        after in _HANGUL_SYLLABLES or any(after in each for each in _HANGUL_LEADING)
    )
