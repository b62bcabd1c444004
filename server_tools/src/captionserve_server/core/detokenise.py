"""From tokens to text, whole and token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, without special tokens."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def caption_text(decode: Decode, token_ids: Sequence[int]) -> str:
    """The text of a whole caption."""
    return decode(token_ids).strip()


def token_texts(decode: Decode, before: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    """Each token's part of the text; together they make it.

    A character of several tokens belongs to the last of them. A special token has no text.

    Args:
        decode: token ids to text.
        before: the tokens before the first one, such as a prefix.
        token_ids: the tokens.
    """
    tokens, texts = list(before), list[str]()
    shown = decode(tokens)
    for number, token in enumerate(token_ids, start=1):
        tokens.append(token)
        text = decode(tokens)
        if text.endswith(_INCOMPLETE) and number < len(token_ids):
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        shown = text
    return texts


class TextStream:
    """Turns a growing run of tokens into pieces of text that are never taken back."""

    def __init__(self, decode: Decode) -> None:
        """Begin before the first token."""
        self._decode = decode
        self._shown = ""

    def next_text(self, token_ids: Sequence[int]) -> str:
        """What has been added to the text.

        Args:
            token_ids: all tokens so far. A character that is incomplete is held back, and so are
                spaces, which a caption does not end with.
        """
        return self._added(self._decode(token_ids).strip().rstrip(_INCOMPLETE).rstrip())

    def last_text(self, token_ids: Sequence[int]) -> str:
        """What is left of the text of a whole caption, which may end within a character."""
        return self._added(caption_text(self._decode, token_ids))

    def _added(self, text: str) -> str:
        added, self._shown = text[len(self._shown) :], text
        return added
