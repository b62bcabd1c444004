"""What a listening caller is told of a caption that is still being decoded, piece by piece.

Two threads share the work. The engine's only takes down what is new (`Updates.news`), which costs a
comparison of lengths; whoever tells the caller makes texts of it (`Updates.update`), in the order
in which the news came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from captionserve_server.core.beams import BeamStep, TokenText, beam_steps
from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.detokenise import Decode, TextStream
from captionserve_server.core.history import HistoryStep


class Progress(Protocol):
    """How far a caption is; what is not asked for is not made."""

    def certain_tokens(self) -> tuple[int, ...]:
        """The generated tokens with which it will begin, whatever comes."""

    def history(self) -> tuple[HistoryStep, ...]:
        """What its search has considered so far; empty unless output_beams was set."""


@dataclass(frozen=True)
class News:
    """What has become known of a caption.

    Attributes:
        certain: all generated tokens that are certain by now.
        known: how many of them were known before.
        steps: of the search, those since the last news.
        is_last: whether this is the whole caption.
    """

    certain: tuple[int, ...]
    known: int
    steps: tuple[HistoryStep, ...]
    is_last: bool


@dataclass(frozen=True)
class Update:
    """What a caller is told of it; all of one caption together are the caption and its search.

    Attributes:
        text: what follows the text told so far, at first the prefix; empty while a character is
            incomplete.
        token_ids: what follows the tokens told so far; the prefix is none of them.
        beam_steps: what the search has considered since; empty unless output_beams was set.
    """

    text: str
    token_ids: tuple[int, ...]
    beam_steps: tuple[BeamStep, ...]


class Updates:
    """The updates of one caption."""

    def __init__(self, plan: CaptionPlan, decode: Decode, token_text: TokenText) -> None:
        """Begin with nothing told.

        Args:
            plan: how it is decoded.
            decode: token ids to text, without special tokens.
            token_text: likewise of a single token.
        """
        self._prefix = plan.words.prefix
        self._tells_steps = plan.options.output_beams
        self._text = TextStream(decode)
        self._token_text = token_text
        # What the engine's thread has taken down.
        self._known = 0
        self._steps = 0

    def news(self, progress: Progress) -> News | None:
        """What is new while the caption is decoded; None if nothing is."""
        steps = progress.history() if self._tells_steps else ()
        certain = progress.certain_tokens()
        if len(certain) <= self._known and len(steps) <= self._steps:
            return None
        return self._taken_down(certain, steps, is_last=False)

    def last_news(self, caption: DecodedCaption) -> News:
        """What is new with the whole caption, the best of its image."""
        steps = () if caption.history is None else caption.history.steps
        return self._taken_down(caption.token_ids, steps, is_last=True)

    def _taken_down(
        self, certain: tuple[int, ...], steps: tuple[HistoryStep, ...], *, is_last: bool
    ) -> News:
        news = News(certain, self._known, steps[self._steps :], is_last)
        self._known, self._steps = len(certain), len(steps)
        return news

    def update(self, news: News) -> Update | None:
        """What the caller is told of the next news; None if there is nothing to tell."""
        tokens = (*self._prefix, *news.certain)
        text = self._text.last_text(tokens) if news.is_last else self._text.next_text(tokens)
        token_ids = news.certain[news.known :]
        if not (text or token_ids or news.steps):
            return None
        return Update(text, token_ids, beam_steps(news.steps, self._token_text))
