"""What a stream has given, so that it can go on over another call where the last one broke off.

The other call says everything from the beginning. The same question has the same answer, but for
sampling without a seed and for a service that has another model by then. In other company numbers
may differ in their last bits, so that steps of a search are compared by what was not dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import grpc

from captionserve._errors import STREAM_BROKEN, CaptionError
from captionserve._results import BeamFate, BeamStep, CaptionUpdate

_Sequence = TypeVar("_Sequence", str, tuple[Any, ...])


class _Told(NamedTuple):
    """What is told of a caption: the beginning of its text, of its tokens, and of its search."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    beam_steps: tuple[_Step, ...] = ()

    @classmethod
    def by(cls, update: CaptionUpdate) -> _Told:
        return cls(update.text, update.token_ids, tuple(map(_not_dropped, update.beam_steps)))

    def and_then(self, other: _Told) -> _Told:
        return _Told(
            self.text + other.text,
            self.token_ids + other.token_ids,
            self.beam_steps + other.beam_steps,
        )

    def begins_as(self, other: _Told) -> bool:
        """Whether, as far as both go, they say the same."""
        return all(_agree(own, others) for own, others in zip(self, other, strict=True))


_Step: TypeAlias = frozenset[tuple[int, int, int | None]]
"""Of each continuation that was kept or finished: its parent, token and beam."""


def _not_dropped(step: BeamStep) -> _Step:
    return frozenset(
        (each.parent, each.token_id, each.beam) for each in step if each.fate != BeamFate.DROPPED
    )


def _agree(one: Sequence[object], other: Sequence[object]) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


class Resumption:
    """Of one stream, over all its calls."""

    def __init__(self) -> None:
        """Begin with nothing given."""
        self._given = _Told()
        self._heard = _Told()

    def begin_anew(self) -> None:
        """What comes now is another call's."""
        self._heard = _Told()

    def fresh(self, update: CaptionUpdate) -> CaptionUpdate | None:
        """What of the present call's next update was not given yet; None where nothing is new.

        Raises:
            CaptionError: STREAM_BROKEN, if this call tells another caption than those before it.
        """
        given, heard = self._given, self._heard.and_then(_Told.by(update))
        new_text, new_token_ids, new_steps = (
            len(now) - len(before) for now, before in zip(heard, given, strict=True)
        )
        # An earlier call may have had more time, where captions may be partial.
        too_short = update.result is not None and min(new_token_ids, new_steps) < 0
        if too_short or not heard.begins_as(given):
            raise CaptionError(
                grpc.StatusCode.UNAVAILABLE,
                STREAM_BROKEN,
                "the stream broke off, and asked again the service tells another caption",
            )
        self._heard = heard
        fresh = dataclasses.replace(
            update,
            text=_last(update.text, new_text),
            token_ids=_last(update.token_ids, new_token_ids),
            beam_steps=_last(update.beam_steps, new_steps),
        )
        self._given = given.and_then(_Told.by(fresh))
        is_new = fresh.text or fresh.token_ids or fresh.beam_steps or fresh.result is not None
        return fresh if is_new else None


def _last(told: _Sequence, count: int) -> _Sequence:
    """The last so many elements."""
    return told[len(told) - max(0, count) :]
