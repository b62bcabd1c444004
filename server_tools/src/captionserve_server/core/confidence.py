"""How far a caption and its words can be trusted, and the signs of a decoder gone astray.

All is read from what captioning leaves behind: the tokens' log-probabilities, groundings and texts,
how the caption ended, and the mean of the image's encoder states.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

# Nearer to probability 0 or 1 than this, a mean log-probability in float32 says nothing more.
_LOWEST_LOGPROB = -100.0
_HIGHEST_LOGPROB = -1e-6
# A word's log-probability nearer to 0 counts as this: what is left is float32's rounding, of which
# the log-odds would make much, and a confidence must not depend on who computed it.
_SUREST_WORD = -1e-4
_LARGEST_WEIGHT = 1e6

# With the straight apostrophe and the typographic one.
_WORD = re.compile(r"[\w'\u2019-]+")
_INCOMPLETE_CHARACTER = "\ufffd"
_PHRASE_WORDS = 3
_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class SpokenWord:
    """A word of a text, and where in its tokens it stands.

    Attributes:
        text: the word.
        first_token: the first token that has a part of it, as an index.
        tokens: how many there are from there to the last that has one.
    """

    text: str
    first_token: int
    tokens: int

    @property
    def own(self) -> slice:
        """Its tokens among all."""
        return slice(self.first_token, self.first_token + self.tokens)


@dataclasses.dataclass(frozen=True)
class Logistic:
    """A confidence as a logistic function of signals.

        log-odds(confidence) = intercept + sum of weight x signal

    Attributes:
        intercept: at most a million, or minus that.
        weights: by the signal's name; likewise, and that of "log_odds" above 0, so that likelier
            tokens never lower the confidence.

    Raises:
        ValueError: if a number is out of range.
    """

    intercept: float
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        """Refuse what gives no confidence."""
        for name, number in {"intercept": self.intercept, **self.weights}.items():
            # Also false of what is no number.
            if not abs(number) <= _LARGEST_WEIGHT:
                raise ValueError(f"{name} must be at most {_LARGEST_WEIGHT:g}, is {number}")
        if self.weights.get("log_odds", 0.0) <= 0:
            raise ValueError("the weight of log_odds must be above 0")

    def confidence(self, signals: Mapping[str, float]) -> float:
        """The confidence, 0..1, from at least the signals that have a weight."""
        weighted = (weight * signals[name] for name, weight in self.weights.items())
        # The logistic function, written so that it never overflows.
        return 0.5 + 0.5 * math.tanh(0.5 * math.fsum((self.intercept, *weighted)))


AS_IT_IS = Logistic(0.0, {"log_odds": 1.0})
"""The probability itself."""


@dataclasses.dataclass(frozen=True)
class Calibration:
    """From the log-probabilities and groundings of tokens to confidences.

    Fitted to captions and words known to be right or wrong, a confidence is the chance that one is
    right, for images like those (see docs/adr/0007-confidence.md and 0021-grounding.md). Without a
    calibration a caption's is the geometric mean of its tokens' probabilities, and a word's the
    product of its own.

    Attributes:
        caption: of a caption, from `caption_signals`.
        word: of a word, from `word_signals`.
        grounded_caption: of a caption whose groundings are known; None where nothing was fitted to
            them, and they change no confidence.
        grounded_word: likewise of a word.
        records: the log-odds with which each word has been right among those of the fit, by the
            word in lower case; "" is for those that the fit has not seen.
        image: of each number of a mean encoder state, its weight in the signal "image" of
            `grounded_caption`; empty where nothing was fitted to it.

    Raises:
        ValueError: if a number is out of range, or the signal has a weight and no image.
    """

    caption: Logistic = AS_IT_IS
    word: Logistic = AS_IT_IS
    grounded_caption: Logistic | None = None
    grounded_word: Logistic | None = None
    records: Mapping[str, float] = dataclasses.field(default_factory=dict)
    image: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what gives no confidence."""
        for name, numbers in {_RECORDS: self.records.values(), _IMAGE: self.image}.items():
            if not all(abs(number) <= _LARGEST_WEIGHT for number in numbers):
                raise ValueError(f"{name} must be at most {_LARGEST_WEIGHT:g}")
        weighs_image = self.grounded_caption and _IMAGE in self.grounded_caption.weights
        if weighs_image and not self.image:
            raise ValueError(f"grounded_caption has a weight of {_IMAGE}, which is empty")

    def caption_confidence(self, evidence: Evidence) -> float:
        """Return the confidence in a caption, 0..1."""
        fit = self.grounded_caption if evidence.token_groundings is not None else None
        return (fit or self.caption).confidence(caption_signals(evidence, self.record, self.image))

    def word_confidence(self, evidence: Evidence, word: SpokenWord) -> float:
        """Return the confidence in a word of a caption, 0..1."""
        fit = self.grounded_word if evidence.token_groundings is not None else None
        return (fit or self.word).confidence(word_signals(evidence, word, self.record))

    def record(self, word: SpokenWord) -> float:
        """The log-odds with which a word has been right; 0 where nothing is known."""
        return self.records.get(word.text.lower(), self.records.get("", 0.0))

    def as_values(self) -> dict[str, Any]:
        """What there is as JSON values: of each fit the intercept, and its weights by name."""
        fits = {name: fit for name in SIGNALS if (fit := getattr(self, name)) is not None}
        values: dict[str, Any] = {
            name: {"intercept": fit.intercept, **fit.weights} for name, fit in fits.items()
        }
        values[_RECORDS] = dict(self.records)
        return values | ({_IMAGE: list(self.image)} if self.image else {})

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(self.as_values(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if the text is anything else.
        """
        return cls.from_values(json.loads(text, parse_int=float))

    @classmethod
    def from_values(cls, values: object) -> Calibration:
        """Read what `as_values` gave; ValueError as `from_json`."""
        if isinstance(values, dict) and values.keys() == {"slope", "intercept"}:
            raise ValueError(
                "is of an older captionserve; `captionserve calibrate` writes a new one"
            )
        needed, known = {"caption", "word", _RECORDS}, {*SIGNALS, _RECORDS, _IMAGE}
        if not isinstance(values, dict) or not needed <= values.keys() <= known:
            raise ValueError(f"must be a JSON object of {', '.join(sorted(known))}")
        image = values.get(_IMAGE, [])
        if not (isinstance(image, list) and _are_numbers(image)):
            raise ValueError(f"{_IMAGE} must be a JSON array of numbers")
        objects = [values[name] for name in values if name != _IMAGE]
        if not all(isinstance(each, dict) and _are_numbers(each.values()) for each in objects):
            raise ValueError(f"all but {_IMAGE} must be JSON objects of numbers")
        fits = {name: _fit(name, values[name]) for name in SIGNALS if name in values}
        return cls(**fits, records=values[_RECORDS], image=tuple(image))


def _are_numbers(values: Iterable[object]) -> bool:
    return all(isinstance(each, float) for each in values)


def _fit(name: str, values: Mapping[str, float]) -> Logistic:
    weights = dict(values)
    if not {"intercept", "log_odds"} <= weights.keys() <= {"intercept", *SIGNALS[name]}:
        raise ValueError(
            f"{name} must have intercept and log_odds, and may have {', '.join(SIGNALS[name][1:])}"
        )
    return Logistic(weights.pop("intercept"), weights)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a confidence is read from.

    Attributes:
        token_logprobs: natural log-probability of each generated token, the end token's included;
            at least one.
        words: the words of what was generated.
        token_groundings: what the image adds to each token's log-probability; None where that is
            not known.
        image_state: mean of the image's encoder states, [encoder width]; known where
            token_groundings are.
    """

    token_logprobs: Sequence[float]
    words: Sequence[SpokenWord] = ()
    token_groundings: Sequence[float] | None = None
    image_state: Sequence[float] = ()

    @functools.cached_property
    def log_odds(self) -> float:
        """Of the caption; each of its words is judged by it as well."""
        return mean_log_odds(self.token_logprobs)


Record = Callable[[SpokenWord], float]
"""Gives the log-odds with which a word has been right."""


def caption_signals(
    evidence: Evidence, record: Record, image: Sequence[float] = ()
) -> dict[str, float]:
    """What speaks for a caption and against it, by name.

    Args:
        evidence: of the caption.
        record: of its words.
        image: as Calibration has it.
    """
    signals = {
        "log_odds": evidence.log_odds,
        # The log-probability that all of them are right, were each as often right as it has been.
        "record": -math.fsum(_softplus(-record(word)) for word in evidence.words),
    }
    if evidence.token_groundings is not None:
        signals["grounding"] = math.fsum(evidence.token_groundings) / len(evidence.token_groundings)
        signals["least_grounding"] = min(evidence.token_groundings)
        if image:
            pairs = zip(image, evidence.image_state, strict=True)
            signals[_IMAGE] = math.fsum(weight * number for weight, number in pairs)
    return signals


def word_signals(evidence: Evidence, word: SpokenWord, record: Record) -> dict[str, float]:
    """What speaks for a word and against it, by name."""
    signals = {
        "log_odds": log_odds(min(math.fsum(evidence.token_logprobs[word.own]), _SUREST_WORD)),
        "caption_log_odds": evidence.log_odds,
        "record": record(word),
    }
    if evidence.token_groundings is not None:
        signals["grounding"] = math.fsum(evidence.token_groundings[word.own])
    return signals


_RECORDS = "records"
_IMAGE = "image"

SIGNALS: Mapping[str, tuple[str, ...]] = {
    "caption": ("log_odds",),
    "word": ("log_odds", "caption_log_odds", "record"),
    "grounded_caption": ("log_odds", "record", "grounding", "least_grounding", _IMAGE),
    "grounded_word": ("log_odds", "caption_log_odds", "record", "grounding"),
}
"""The signals that each fit of a Calibration may have weights for."""


def _softplus(number: float) -> float:
    """log(1 + exp(number))."""
    return max(number, 0.0) + math.log1p(math.exp(-abs(number)))


def mean_log_odds(token_logprobs: Sequence[float]) -> float:
    """Return the log-odds of the geometric mean of the tokens' probabilities, -100 to 14.

    Args:
        token_logprobs: natural log-probabilities, at least one.
    """
    return log_odds(math.fsum(token_logprobs) / len(token_logprobs))


def log_odds(logprob: float) -> float:
    """Return the log-odds of a probability, -100 to 14, from its natural logarithm."""
    logprob = min(max(logprob, _LOWEST_LOGPROB), _HIGHEST_LOGPROB)
    return logprob - math.log(-math.expm1(logprob))


def spoken_words(token_texts: Sequence[str]) -> list[SpokenWord]:
    """The words of a text, in their order.

    A word is a run of letters, digits, underscores, apostrophes and hyphens. What stands between
    words, and the end token, belongs to none.

    Args:
        token_texts: each token's part of the text; together they are the text.
    """
    ends = list(accumulate(map(len, token_texts)))
    words = []
    for match in _WORD.finditer("".join(token_texts)):
        first, last = bisect_right(ends, match.start()), bisect_left(ends, match.end())
        words.append(SpokenWord(match.group(), first, last + 1 - first))
    return words


def is_degenerate(token_texts: Sequence[str], finished: bool) -> bool:
    """Tell whether a caption is empty, goes round in circles or breaks off within a word.

    A word is a run of letters, digits, underscores, apostrophes and hyphens; case does not matter.
    A caption is degenerate if

    - it has no word, or
    - the same 1 or 2 words occur three times in a row ("a dog, a dog, a dog"), or
    - the same 3 words occur in three places that do not overlap, as they do when a longer phrase
      is repeated in a row, or
    - it is not finished and its text ends in an incomplete character (U+FFFD), or
    - it is not finished and its text ends in a word of several tokens, so that the word may go on.
      A word that breaks off after its first token cannot be told from a whole one.

    Args:
        token_texts: each generated token's part of the text, special tokens' empty; together they
            are the text.
        finished: whether the end token was produced.
    """
    words = [word.casefold() for word in _WORD.findall("".join(token_texts))]
    if not words or _goes_round(words) or _comes_back(words):
        return True
    return not finished and _ends_within_word(token_texts)


def _goes_round(words: Sequence[str]) -> bool:
    """Whether fewer than _PHRASE_WORDS words occur _REPEATS times in a row."""
    return any(_is_loop_of(size, words) for size in range(1, _PHRASE_WORDS))


def _is_loop_of(size: int, words: Sequence[str]) -> bool:
    repeated = 0
    for earlier, later in zip(words, words[size:], strict=False):
        repeated = repeated + 1 if earlier == later else 0
        if repeated == size * (_REPEATS - 1):
            return True
    return False


def _comes_back(words: Sequence[str]) -> bool:
    """Whether _PHRASE_WORDS words occur in _REPEATS places apart."""
    places: Counter[tuple[str, ...]] = Counter()
    free_from: dict[tuple[str, ...], int] = {}
    for start in range(len(words) - _PHRASE_WORDS + 1):
        phrase = tuple(words[start : start + _PHRASE_WORDS])
        if start >= free_from.get(phrase, 0):
            places[phrase] += 1
            free_from[phrase] = start + _PHRASE_WORDS
    return max(places.values(), default=0) >= _REPEATS


def _ends_within_word(token_texts: Sequence[str]) -> bool:
    text = "".join(token_texts)
    if text.endswith(_INCOMPLETE_CHARACTER):
        return True
    *_, last = _WORD.finditer(text)
    return last.end() == len(text) and _tokens_after(last.start(), token_texts) > 1


def _tokens_after(position: int, token_texts: Sequence[str]) -> int:
    """How many tokens have a part in what follows a position of the text."""
    ends = accumulate(len(part) for part in token_texts)
    return sum(end > position and part != "" for end, part in zip(ends, token_texts, strict=True))
