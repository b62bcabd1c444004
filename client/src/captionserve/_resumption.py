"""What a stream has given, so that it can go on over another call where the last one broke off.

The other call says everything from the beginning. The same question has the same answer, but for
sampling without a seed and for a service that has another model by then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import grpc

from captionserve._errors import STREAM_BROKEN, CaptionError
from captionserve._results import CaptionUpdate


class _Words(NamedTuple):
    """A caption's beginning: its text, and its tokens."""

    text: str = ""
    token_ids: tuple[int, ...] = ()

    def and_then(self, update: CaptionUpdate) -> _Words:
        return _Words(self.text + update.text, self.token_ids + update.token_ids)

    def begins_as(self, other: _Words) -> bool:
        """Whether, as far as both go, they say the same."""
        return all(_agree(own, others) for own, others in zip(self, other, strict=True))


def _agree(one: Sequence[object], other: Sequence[object]) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


class Resumption:
    """Of one stream, over all its calls."""

    def __init__(self) -> None:
        """Begin with nothing given."""
        self._given = _Words()
        self._heard = _Words()

    def begin_anew(self) -> None:
        """What comes now is another call's."""
        self._heard = _Words()

    def fresh(self, update: CaptionUpdate) -> CaptionUpdate | None:
        """What of the present call's next update was not given yet; None where nothing is new.

        Raises:
            CaptionError: STREAM_BROKEN, if this call tells another caption than those before it.
        """
        given, heard = self._given, self._heard.and_then(update)
        # An earlier call may have had more time, where captions may be partial.
        too_short = update.result is not None and len(heard.token_ids) < len(given.token_ids)
        if too_short or not heard.begins_as(given):
            raise CaptionError(
                grpc.StatusCode.UNAVAILABLE,
                STREAM_BROKEN,
                "the stream broke off, and asked again the service tells another caption",
            )
        self._heard = heard
        new = _Words(heard.text[len(given.text) :], heard.token_ids[len(given.token_ids) :])
        self._given = given.and_then(CaptionUpdate(*new, None))
        if update.result is None and not any(new):
            return None
        return dataclasses.replace(update, text=new.text, token_ids=new.token_ids)
