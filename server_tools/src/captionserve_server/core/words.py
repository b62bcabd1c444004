"""Words of the options as tokens of the checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.options import DecodingOptions

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens."""
TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class ForcedWord:
    """A word or phrase that every caption must contain, as one of two runs of tokens.

    Attributes:
        spaced: the tokens with a leading space; valid anywhere.
        initial: the tokens without one; valid only where a caption begins. None where it never
            can, because a prefix begins it.
    """

    spaced: TokenIds
    initial: TokenIds | None

    @property
    def length(self) -> int:
        """Tokens of the longer form."""
        return max(len(self.spaced), len(self.initial or ()))


@dataclass(frozen=True)
class TokenRuns:
    """Runs of tokens side by side, to be looked for at the end of rows.

    Attributes:
        before: int32 [runs, longest], all tokens but the last, at the right; -1 at their left.
        last: int64 [runs], the last token of each.
        lengths: int64 [runs], tokens of each before the last.
    """

    before: NDArray[np.int32]
    last: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, runs: Sequence[TokenIds]) -> TokenRuns:
        """The runs, none of them empty."""
        longest = max((len(run) - 1 for run in runs), default=0)
        before = np.full((len(runs), longest), -1, np.int32)
        for number, run in enumerate(runs):
            before[number, longest - len(run) + 1 :] = run[:-1]
        return cls(
            before,
            last=np.array([run[-1] for run in runs], np.int64),
            lengths=np.array([len(run) - 1 for run in runs], np.int64),
        )


@dataclass(frozen=True)
class WordTokens:
    """The text options as tokens.

    Attributes:
        prefix: with what the caption begins.
        bad: runs of tokens that are not generated.
        forced: what every caption contains beside what the prefix has already.
        bad_runs: `bad`, as it is looked for at each step.
    """

    prefix: TokenIds = ()
    bad: tuple[TokenIds, ...] = ()
    forced: tuple[ForcedWord, ...] = ()
    bad_runs: TokenRuns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Lay the runs side by side once, not at each step."""
        object.__setattr__(self, "bad_runs", TokenRuns.of(self.bad))


NO_WORDS = WordTokens()


def word_tokens(options: DecodingOptions, encode: Encode) -> WordTokens:
    """Tokenise the text options.

    Raises:
        InvalidOptionsError: if max_length leaves no room for the prefix or the forced words, or a
            forced word has no tokens.
    """
    # A trailing space would be a token of its own, which captions never continue from.
    text = options.prefix.rstrip()
    # Not asked about no text: a tokenizer lets other threads run, and waits for its turn after it.
    prefix = tuple(encode(text)) if text else ()
    runs = dict.fromkeys(run for word in options.bad_words for run in _runs(word, encode))
    forced = (_forced_word(word, encode) for word in options.force_words)
    given = 1 + len(prefix)
    longest = given + options.new_tokens(given)
    words = WordTokens(
        prefix=prefix,
        # What is longer than a caption never comes, nor does what the tokenizer has no token for.
        bad=tuple(run for run in runs if 0 < len(run) <= longest),
        forced=tuple(_after(prefix, word) for word in forced if not _has(prefix, word)),
    )
    _check_room(options, words)
    return words


def check_tokens(words: WordTokens, vocabulary_size: int) -> None:
    """Refuse tokens that the model does not know: a tokenizer may have more than it.

    Raises:
        InvalidOptionsError: naming the options whose text has such tokens.
    """
    tokens = {
        "prefix": words.prefix,
        "bad_words": [token for run in words.bad for token in run],
        "force_words": [
            token for word in words.forced for token in (*word.spaced, *(word.initial or ()))
        ],
    }
    text = "has a token that the tokenizer knows and the model does not"
    beyond = [name for name, ids in tokens.items() if max(ids, default=0) >= vocabulary_size]
    if beyond:
        raise InvalidOptionsError(dict.fromkeys(beyond, text))


def _runs(word: str, encode: Encode) -> tuple[TokenIds, TokenIds]:
    """A word's tokens without and with a leading space."""
    text = word.strip()
    return tuple(encode(text)), tuple(encode(" " + text))


def _forced_word(word: str, encode: Encode) -> ForcedWord:
    initial, spaced = _runs(word, encode)
    if not initial or not spaced:
        raise InvalidOptionsError({"force_words": "has a word for which there are no tokens"})
    return ForcedWord(spaced, initial)


def _has(prefix: TokenIds, word: ForcedWord) -> bool:
    """Whether the prefix has the word already."""
    size = len(word.spaced)
    runs = (prefix[begin : begin + size] for begin in range(len(prefix) - size + 1))
    begins = word.initial is not None and prefix[: len(word.initial)] == word.initial
    return begins or word.spaced in runs


def _after(prefix: TokenIds, word: ForcedWord) -> ForcedWord:
    """The word as it may still come."""
    return ForcedWord(word.spaced, None) if prefix else word


def _check_room(options: DecodingOptions, words: WordTokens) -> None:
    room = options.new_tokens(1 + len(words.prefix))
    if room < 1:
        text = f"has {len(words.prefix)} tokens, which leaves none of max_length to generate"
        raise InvalidOptionsError({"prefix": text, "max_length": "is too small for the prefix"})
    needed = sum(word.length for word in words.forced)
    if needed > room:
        name = options.length_name
        text = f"have {needed} tokens, {name} leaves room for {room}"
        raise InvalidOptionsError({"force_words": text, name: "is too small"})
