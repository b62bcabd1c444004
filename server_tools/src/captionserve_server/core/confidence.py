"""How far a caption can be trusted: a confidence, and the signs of a decoder gone astray.

Both are read from the caption alone: its tokens' log-probabilities, their texts and how it ended.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

# Nearer to probability 0 or 1 than this, a mean log-probability in float32 says nothing more.
_LOWEST_MEAN_LOGPROB = -100.0
_HIGHEST_MEAN_LOGPROB = -1e-6

# With the straight apostrophe and the typographic one.
_WORD = re.compile(r"[\w'\u2019-]+")
_INCOMPLETE_CHARACTER = "\ufffd"
_PHRASE_WORDS = 3
_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Calibration:
    """From a caption's token log-probabilities to a confidence.

    With p the geometric mean of the tokens' probabilities,

        log-odds(confidence) = intercept + slope * log-odds(p)

    so that the default, which every checkpoint without a calibration has, gives p itself. Fitted to
    captions known to be right or wrong, the confidence is the chance that a caption is right, for
    images like those (see docs/adr/0007-confidence.md).

    Attributes:
        slope: finite and above 0, so that likelier tokens never lower the confidence.
        intercept: finite.

    Raises:
        ValueError: if slope or intercept is out of range.
    """

    slope: float = 1.0
    intercept: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what gives no confidence."""
        if not (math.isfinite(self.slope) and self.slope > 0):
            raise ValueError(f"slope must be finite and above 0, is {self.slope}")
        if not math.isfinite(self.intercept):
            raise ValueError(f"intercept must be finite, is {self.intercept}")

    def confidence(self, token_logprobs: Sequence[float]) -> float:
        """Return the confidence in a caption, 0..1.

        Args:
            token_logprobs: natural log-probability of each generated token, the end token's
                included; at least one.
        """
        log_odds = self.intercept + self.slope * mean_log_odds(token_logprobs)
        # The logistic function, written so that it never overflows.
        return 0.5 + 0.5 * math.tanh(0.5 * log_odds)

    def to_json(self) -> str:
        """Write as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if the text is anything else.
        """
        values = json.loads(text, parse_int=float)
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise ValueError(f"must be a JSON object of {' and '.join(names)}, nothing else")
        if not all(isinstance(value, float) for value in values.values()):
            raise ValueError(f"{' and '.join(names)} must be numbers")
        return cls(**values)


def mean_log_odds(token_logprobs: Sequence[float]) -> float:
    """Return the log-odds of the geometric mean of the tokens' probabilities, -100 to 14.

    Args:
        token_logprobs: natural log-probabilities, at least one.
    """
    mean = math.fsum(token_logprobs) / len(token_logprobs)
    mean = min(max(mean, _LOWEST_MEAN_LOGPROB), _HIGHEST_MEAN_LOGPROB)
    return mean - math.log(-math.expm1(mean))


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
