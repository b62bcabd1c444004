"""Words of the options as tokens of the checkpoint's tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
class WordTokens:
    """The text options as tokens.

    Attributes:
        prefix: with what the caption begins.
        bad: runs of tokens that are not generated.
        forced: what every caption contains.
    """

    prefix: TokenIds = ()
    bad: tuple[TokenIds, ...] = ()
    forced: tuple[ForcedWord, ...] = ()


NO_WORDS = WordTokens()


def word_tokens(options: DecodingOptions, encode: Encode) -> WordTokens:
    """Tokenise the text options.

    Raises:
        InvalidOptionsError: if max_length leaves no room for the prefix or the forced words.
    """
    # A trailing space would be a token of its own, which captions never continue from.
    prefix = tuple(encode(options.prefix.rstrip()))
    words = WordTokens(
        prefix=prefix,
        bad=tuple(dict.fromkeys(run for word in options.bad_words for run in _runs(word, encode))),
        forced=tuple(_forced_word(word, encode, bool(prefix)) for word in options.force_words),
    )
    _check_room(options, words)
    return words


def _runs(word: str, encode: Encode) -> tuple[TokenIds, TokenIds]:
    """A word's tokens without and with a leading space."""
    text = word.strip()
    return tuple(encode(text)), tuple(encode(" " + text))


def _forced_word(word: str, encode: Encode, has_prefix: bool) -> ForcedWord:
    initial, spaced = _runs(word, encode)
    return ForcedWord(spaced, None if has_prefix else initial)


def _check_room(options: DecodingOptions, words: WordTokens) -> None:
    room = options.new_tokens(1 + len(words.prefix))
    if room < 1:
        text = f"has {len(words.prefix)} tokens, which leaves none of max_length to generate"
        raise InvalidOptionsError({"prefix": text, "max_length": "is too small for the prefix"})
    needed = sum(word.length for word in words.forced)
    if needed > room:
        text = f"have {needed} tokens, max_length leaves room for {room}"
        raise InvalidOptionsError({"force_words": text, "max_length": "is too small"})
