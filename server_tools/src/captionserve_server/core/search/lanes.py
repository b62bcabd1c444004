"""Arrays side by side, one entry for each lane, that are kept and joined as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.step_model import BoolArray

_Record = TypeVar("_Record", bound="LaneRecord")


@dataclass(frozen=True)
class LaneRecord:
    """What is known of each lane; every field has one entry a lane.

    A field is an array whose first dim is [lanes], a tuple of [lanes], or a record of its own. The
    third dim of an array counts tokens and is as long as the longest lane needs.
    """

    def with_fields(self: _Record, **fields: Any) -> _Record:
        """The same with some fields new; dataclasses.replace takes several times as long."""
        return type(self)(**{**vars(self), **fields})

    def kept(self: _Record, staying: BoolArray) -> _Record:
        """The lanes that stay, [lanes]; a copy."""
        return type(self)(**{name: _kept(value, staying) for name, value in vars(self).items()})

    def followed_by(self: _Record, lanes: _Record) -> _Record:
        """These lanes, then the others; a copy."""
        others = vars(lanes)
        return type(self)(
            **{name: _joined(value, others[name]) for name, value in vars(self).items()}
        )


def _kept(value: Any, staying: BoolArray) -> Any:
    if isinstance(value, LaneRecord):
        return value.kept(staying)
    if isinstance(value, tuple):
        return tuple(entry for entry, stays in zip(value, staying, strict=True) if stays)
    return value[staying]


def _joined(value: Any, other: Any) -> Any:
    if isinstance(value, LaneRecord):
        return value.followed_by(other)
    if isinstance(value, tuple):
        return value + other
    if value.ndim == 3:
        longest = max(value.shape[2], other.shape[2])
        value, other = _stretched(value, longest), _stretched(other, longest)
    return np.concatenate((value, other))


def _stretched(array: NDArray[Any], longest: int) -> NDArray[Any]:
    """The array with zeros behind, so that its third dim is `longest`."""
    if array.shape[2] == longest:
        return array
    wider = np.zeros((*array.shape[:2], longest), array.dtype)
    wider[:, :, : array.shape[2]] = array
    return wider
