"""Alt text from a caption: what everybody does to it by hand, and the reasons to look at it again.

The words are English, as the captions are. What a caption cannot know stays unknown; see
docs/alt-text.md. Steps that leave neither letter nor digit are not taken, so that there is a text
wherever there is a caption; and the alt text of an alt text is itself.
"""

from __future__ import annotations

import enum
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from string import punctuation
from typing import Protocol

from captionserve import _graphemes

DEFAULT_MAX_CHARS = 125
"""The customary limit of alternative texts."""
DEFAULT_HEDGE_BELOW = 0.5
"""A confidence below this says: rather wrong than right."""

_HEDGE = "Possibly "
_HEDGES = frozenset({"possibly", "maybe", "perhaps", "probably"})

_ARTICLES = frozenset({"a", "an", "the"})
_CONJUNCTIONS = frozenset({"and", "but", "nor", "or", "while"})
_PREPOSITIONS_AND_SUCH = """
    about above across after against along among are around as at back be before behind below
    beneath beside between by down each for from front has have her his in inside into is it its
    near next of off on onto out outside over past that their this through to toward towards
    under up upon was were which who with within without
"""
# They say nothing alone, and a cut does not leave them as the end.
_FUNCTION_WORDS = _ARTICLES | _CONJUNCTIONS | frozenset(_PREPOSITIONS_AND_SUCH.split())

# What says something of the picture itself, as "a black and white photo of" does, is no mere
# opening; and "a shot of" may be of whisky. Texts are matched once white space is single spaces.
_MEDIUM = r"(?:image|photograph|photo|picture|pic|snapshot)s?"
_CLOSE_UP = rf"(?:(?:extreme|very) )?close[ -]?up(?: (?:{_MEDIUM}|shots?|views?))?"
_POINTING = r"(?:(?:here|it|this)(?: is|['\u2019]s) )?(?:(?:an?|some|that|the|this) )?"
_SHOWING = r"(?:(?:is|that|which) )?(?:depicting|depicts?|featuring|features?|of|showing|shows?)\b"
_SEEN_IN = r"(?:,|,? (?:there (?:is|are)|(?:one|we|you) (?:can |may )?see)\b)"
_OPENING = re.compile(
    rf"({_POINTING}(?:{_CLOSE_UP}|{_MEDIUM}) {_SHOWING}|in (?:the|this) {_MEDIUM}{_SEEN_IN})"
    r"[ ,.:;\u2013\u2014\u2026-]*",
    re.IGNORECASE,
)
_STOPS = r"[,.:;\u2013\u2014\u2026-]"
_LOOSE_START = re.compile(rf"(?:{_STOPS}+ )+")
_LOOSE_STOP = re.compile(r" +([.,](?= |$))")
# "U.S." keeps its last stop.
_INITIALS_AT_END = re.compile(r"(?:^|\W)(?:\w\.){2,}$")
# A fragment has no full stop, and nothing that is left open.
_NOT_AT_END = " .,:;-\u2013\u2014\u2026/&|~([{\u201c\u2018\u00ab"

_IMAGE_FILE = re.compile(
    r"\S\.(?:avif|bmp|gif|heic|heif|jfif|jpe?g|png|ppm|svg|tiff?|webp)\b", re.IGNORECASE
)
_NUMBERED_FILE = re.compile(
    r"(?:dsc[fn]?|image|img|mvi|photo|pic|picture|pict|pxl|scan|screenshot|untitled)"
    r"[\d\W_]*\d[\d\W_]*",
    re.IGNORECASE,
)

_LEAST_TELLING_WORDS = 2
# As much of an alt text, in words, is enough for it to say nothing new.
_REPEATED_SHARE = 0.8
# Nearby words are looked at so many times as many as the alt text has: a long article has all
# words somewhere, and repeats nothing.
_NEARBY_STRETCH = 2


class AltTextWarning(str, enum.Enum):
    """Why somebody should look at an alt text."""

    TOO_SHORT = "too_short"
    """It has fewer than two words that tell something."""
    FILE_NAME = "file_name"
    """It reads like the name of a file, or is that of the image's."""
    REPEATS_NEARBY_TEXT = "repeats_nearby_text"
    """Whoever hears it has heard the same in the text beside the image."""
    UNFINISHED = "unfinished"
    """The caption ended amid a phrase, whose beginning was left out."""
    DEGENERATE = "degenerate"
    """The caption looks broken: it runs in circles, or ends within a word."""
    LOW_CONFIDENCE = "low_confidence"
    """The caption's confidence is below that of hedging."""
    NEEDS_REVIEW = "needs_review"
    """The service itself says that the caption needs a review."""

    __str__ = str.__str__


@dataclass(frozen=True)
class AltText:
    """A text to stand in for an image. A draft: what the image is there for, only a person knows.

    Attributes:
        text: what `str()` gives; plain text, not HTML. Empty only where the caption is.
        removed: the opening phrases that were left out, as the caption had them, in their order.
        hedged: whether it begins with a word of doubt.
        truncated: whether the caption was longer than allowed.
        warnings: reasons to look at it, in the order of `AltTextWarning`.
    """

    text: str
    removed: tuple[str, ...]
    hedged: bool
    truncated: bool
    warnings: tuple[AltTextWarning, ...]

    def __str__(self) -> str:
        """The text."""
        return self.text


class Described(Protocol):
    """A caption, and what is known of it."""

    @property
    def text(self) -> str:
        """The caption."""

    @property
    def confidence(self) -> float:
        """How far it can be relied on, 0 to 1."""

    @property
    def degenerate(self) -> bool:
        """Whether it looks broken."""


def alt_text_of(
    caption: Described,
    max_chars: int = DEFAULT_MAX_CHARS,
    nearby_text: str | None = None,
    file_name: str | os.PathLike[str] | None = None,
    hedge_below: float = DEFAULT_HEDGE_BELOW,
) -> AltText:
    """A caption as alt text; arguments and errors are those of `CaptionResult.alt_text`."""
    _check(max_chars, hedge_below)
    whole, removed = _without_openings(_folded(caption.text))
    whole = _without_loose_end(whole)
    finished = _without_dangling_words(whole)
    fitted = _fitted(finished, max_chars)
    unsure = caption.confidence < hedge_below
    hedge = _HEDGE if unsure and _can_be_hedged(fitted, max_chars) else ""
    fitted = _fitted(fitted, max_chars - len(hedge))
    text = _in_usual_case(fitted)
    found = {
        AltTextWarning.TOO_SHORT: len(_telling_words(fitted)) < _LEAST_TELLING_WORDS,
        AltTextWarning.FILE_NAME: _is_like_file_name(fitted, file_name),
        AltTextWarning.REPEATS_NEARBY_TEXT: _repeats(fitted, nearby_text or ""),
        AltTextWarning.UNFINISHED: finished != whole,
        AltTextWarning.DEGENERATE: caption.degenerate,
        AltTextWarning.LOW_CONFIDENCE: unsure,
        AltTextWarning.NEEDS_REVIEW: getattr(caption, "needs_review", False),
    }
    return AltText(
        text=_with_capital(hedge + _within_sentence(text) if hedge else text),
        removed=removed,
        hedged=bool(hedge) or _first_word(fitted) in _HEDGES,
        truncated=fitted != finished,
        warnings=tuple(warning for warning, is_so in found.items() if is_so),
    )


def _check(max_chars: int, hedge_below: float) -> None:
    if isinstance(max_chars, bool) or not isinstance(max_chars, int):
        raise TypeError(f"max_chars must be a whole number, is {max_chars!r}")
    if max_chars < 1:
        raise ValueError(f"max_chars must be 1 or more, is {max_chars}")
    if not 0 <= hedge_below <= 1:
        raise ValueError(f"hedge_below must be from 0 to 1, is {hedge_below}")


def _can_be_hedged(text: str, max_chars: int) -> bool:
    """Whether there is something to doubt, and room for it beside the doubt."""
    room = max_chars - len(_HEDGE)
    if room < len(_HEDGE) or _first_word(text) in _HEDGES:
        return False
    return bool(_telling_words(_fitted(text, room)))


def _folded(text: str) -> str:
    """The text in a line, without stops that stand alone."""
    line = " ".join(text.split())
    start = _LOOSE_START.match(line)
    if start and _says_something(line[start.end() :]):
        line = line[start.end() :]
    return _LOOSE_STOP.sub(r"\1", line)


def _without_openings(text: str) -> tuple[str, tuple[str, ...]]:
    """The text behind its opening phrases, and these."""
    removed = []
    while (opening := _OPENING.match(text)) and _says_something(text[opening.end() :]):
        removed.append(opening[1])
        text = text[opening.end() :]
    return text, tuple(removed)


def _says_something(text: str) -> bool:
    return any(map(str.isalnum, text))


def _without_loose_end(text: str) -> str:
    if _INITIALS_AT_END.search(text):
        return text
    return text.rstrip(_NOT_AT_END) or text


def _without_dangling_words(text: str) -> str:
    """The text up to where a phrase begins that has no more than its beginning."""
    *_, before, last = ["", "", *map(_bare, text.split(" "))]
    # "the letter a" is whole, "and a" is not.
    dangles = last in _CONJUNCTIONS | _ARTICLES and (last != "a" or before in _FUNCTION_WORDS)
    return _without_function_words_at_end(text) if dangles else text


def _without_function_words_at_end(text: str) -> str:
    """The text up to its last word that is none; its first word stays."""
    words = text.split(" ")
    while len(words) > 1 and (_bare(words[-1]) in _FUNCTION_WORDS or not _bare(words[-1])):
        words.pop()
    return _without_loose_end(" ".join(words))


def _bare(word: str) -> str:
    """A word without case and punctuation; empty if it is punctuation alone."""
    if not _says_something(word):
        return ""
    return re.sub(r"^\W+|\W+$", "", word).casefold()


def _first_word(text: str) -> str:
    return _bare(text.partition(" ")[0])


def _fitted(text: str, most: int) -> str:
    """The text, or as many of its words as go into `most` code points."""
    if len(text) <= most:
        return text
    words, _, _ = text[: most + 1].rpartition(" ")
    if words:
        return _without_function_words_at_end(words)
    return _without_loose_end(_graphemes.beginning(text, most))


def _in_usual_case(text: str) -> str:
    """Lower case where a title's or a shout's capitals stand for nothing.

    That is where every word behind the first has one, also an article or the like; other capitals
    are names and acronyms.
    """
    words = text.split(" ")
    others = words[2:] if _first_word(text) in _HEDGES else words[1:]
    # "Vitamin A" is no title.
    if len(others) < 2 or any(map(_begins_lower, others)):
        return text
    if not any(_bare(word) in _FUNCTION_WORDS for word in others):
        return text
    shouted = not any(map(str.islower, text))
    # A word with more capitals than the others of a title is an acronym.
    return " ".join(
        word if _has_inner_capital(word) and not shouted else _lower(word) for word in words
    )


def _begins_lower(word: str) -> bool:
    return next(filter(str.isalnum, word), "").islower()


def _has_inner_capital(word: str) -> bool:
    return any(map(str.isupper, word.lstrip(punctuation)[1:]))


def _lower(text: str) -> str:
    """In lower case, in as many code points."""
    return "".join(low if len(low := each.lower()) == 1 else each for each in text)


def _within_sentence(text: str) -> str:
    """The text as it stands behind other words: an article at its beginning has no capital."""
    first, space, rest = text.partition(" ")
    return (_lower(first) if _bare(first) in _FUNCTION_WORDS else first) + space + rest


def _with_capital(text: str) -> str:
    """The text with a capital at its beginning, but for words such as iPhone."""
    first = text.partition(" ")[0]
    place = next((at for at, each in enumerate(first) if each.isalnum()), None)
    if place is None or _has_inner_capital(first):
        return text
    capital = first[place].title()
    # "ß" has none of its own.
    return text[:place] + capital + text[place + 1 :] if len(capital) == 1 else text


def _is_like_file_name(text: str, file_name: str | os.PathLike[str] | None) -> bool:
    only_word = " " not in text
    if _IMAGE_FILE.search(text) or _NUMBERED_FILE.fullmatch(text) or (only_word and "_" in text):
        return True
    name = "" if file_name is None else Path(file_name).stem
    return _says_something(name) and _letters(name) == _letters(text)


def _letters(text: str) -> str:
    """All letters and digits of a text, in one form each."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def _telling_words(text: str) -> list[str]:
    """The words that say something, in one form each: case, plural and marks aside."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    telling = (word for word in words if word not in _FUNCTION_WORDS)
    return [word.removesuffix("s") if len(word) > 3 else word for word in telling]


def _repeats(text: str, nearby_text: str) -> bool:
    """Whether some stretch of the nearby text has nearly all that a text tells."""
    wanted = set(_telling_words(text))
    last_seen: dict[str, int] = {}
    for place, word in enumerate(_telling_words(nearby_text)):
        if word not in wanted:
            continue
        last_seen[word] = place
        within = sum(place - seen < _NEARBY_STRETCH * len(wanted) for seen in last_seen.values())
        if within >= _REPEATED_SHARE * len(wanted):
            return True
    return False
