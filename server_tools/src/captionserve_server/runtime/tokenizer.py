"""A checkpoint's tokenizer, as captions need it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


class CaptionTokenizer:
    """Text to tokens and back; what a caller writes is text, whatever it looks like."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer over, whose settings are changed."""
        # A caller who writes <|endoftext|> means these letters, not the end of the caption.
        tokenizer.encode_special_tokens = True
        # A tokenizer.json may keep these from training, where captions were cut and filled up.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @classmethod
    def from_file(cls, path: Path) -> CaptionTokenizer:
        """Read a tokenizer.json; what the library raises where it cannot is no one class."""
        return cls(Tokenizer.from_file(str(path)))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        text: str = self._tokenizer.decode(token_ids)
        return text
