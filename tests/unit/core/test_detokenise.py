"""Text token by token is the text as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from captionserve_server.core.detokenise import TextStream, caption_text, token_texts
from hypothesis import example, given
from hypothesis import strategies as st

END = 256


def decode(token_ids: Sequence[int]) -> str:
    """One token for each byte, as a byte-level tokenizer without merges has; END is special."""
    return bytes(token for token in token_ids if token != END).decode(errors="replace")


texts = st.text(st.characters(codec="utf-8"), max_size=12)


@given(texts, texts)
def test_token_texts_make_the_text(prefix: str, text: str) -> None:
    before, tokens = list(prefix.encode()), [*text.encode(), END]
    parts = token_texts(decode, before, tokens)
    assert len(parts) == len(tokens)
    assert "".join(parts) == text
    assert parts[-1] == ""


def test_a_character_belongs_to_its_last_token() -> None:
    assert token_texts(decode, [], list("a\u00e9b".encode())) == ["a", "", "\u00e9", "b"]


def test_an_incomplete_end_is_shown() -> None:
    assert token_texts(decode, [], [97, 0xC3]) == ["a", "\N{REPLACEMENT CHARACTER}"]


@given(st.lists(st.integers(0, 256)))
@example([*b"ab", 0xC3])
@example([*b"a ", 0xF0, 0x9F])
@example([0xE2, 0x82, *b" ", END])
def test_the_parts_of_a_stream_are_the_text(tokens: list[int]) -> None:
    stream = TextStream(decode)
    parts = [stream.next_text(tokens[:count]) for count in range(1, len(tokens) + 1)]
    assert "".join([*parts, stream.last_text(tokens)]) == caption_text(decode, tokens)


@given(texts)
def test_what_is_incomplete_is_held_back(text: str) -> None:
    stream = TextStream(decode)
    tokens = text.encode()
    for count in range(1, len(tokens) + 1):
        part = stream.next_text(list(tokens[:count]))
        assert text.startswith(part) or part.strip() in text
        assert not part.endswith("\N{REPLACEMENT CHARACTER}")
