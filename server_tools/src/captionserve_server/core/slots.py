"""Where the decoder's keys and values live between steps.

Each caption owns one slot: the cross-attention keys and values of its image, and a growing memory
of self-attention entries, one per row and step. Entries are only ever appended. Beams that part or
die move nothing: each row has a mask of the entries it descends from, and attention skips the
others.

Occupied slots stand first and without gaps in every array, so that what a step reads is a view of
the whole arrays, never a copy. Callers hold handles, which are not reused; a slot's place may
change when another one is freed.

Invariants:
    1. A handle is valid from `add` until `remove`, and names one place.
    2. Places 0 .. len(self) - 1 are occupied, the others are not.
    3. An entry, once written, is not changed until its caption is removed.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.step_model import Float32Array, Int64Array

# Entries are reserved in blocks of this many: attention runs over all of them, used or not, and
# memory is laid anew whenever more are needed.
ENTRY_BLOCK = 16
# Added to the score of an entry that a row does not descend from; exp() of it is 0 in float32.
HIDDEN = np.float32(-1.0e30)


_Element = TypeVar("_Element", bound=np.generic)


class SlotStore:
    """Keys, values and descent of all live captions."""

    def __init__(self, geometry: DecoderGeometry, capacity: int) -> None:
        """Reserve room for `capacity` captions; the pages are touched only when used."""
        self._geometry = geometry
        self._capacity = capacity
        shape = (capacity, geometry.heads, geometry.image_tokens, geometry.head_dim)
        self._cross = [np.zeros(shape, np.float32) for _ in range(2 * geometry.layers)]
        self._places: dict[int, int] = {}
        self._handles: list[int] = []
        self._next_handle = 0
        self._positions = np.zeros(capacity, np.int64)
        self._used = np.zeros(capacity, np.int64)
        self._self: list[Float32Array] = []
        self._visible: NDArray[np.bool_] = np.zeros((capacity, 1, 0), np.bool_)
        self._reserve_entries(ENTRY_BLOCK)

    def __len__(self) -> int:
        """Captions in slots."""
        return len(self._handles)

    @property
    def entries(self) -> int:
        """Self-attention entries remembered for all captions."""
        return int(self._used[: len(self)].sum())

    @property
    def room(self) -> int:
        """Captions that could still be taken in."""
        return self._capacity - len(self)

    def next_cross(self, count: int) -> list[Float32Array]:
        """2 L views [count, H, S, D], where the next captions' keys and values are to be written.

        Raises:
            IndexError: if there is no room for so many.
        """
        self._require_room(count)
        begin = len(self)
        return [store[begin : begin + count] for store in self._cross]

    def add(self, count: int) -> Int64Array:
        """Take captions in whose keys and values have been written to `next_cross(count)`.

        Returns:
            [count], the captions' handles.

        Raises:
            IndexError: if there is no room for so many.
        """
        self._require_room(count)
        places = range(len(self), len(self) + count)
        handles = range(self._next_handle, self._next_handle + count)
        for array in (self._positions, self._used, self._visible):
            array[places.start : places.stop] = 0
        self._next_handle = handles.stop
        self._handles.extend(handles)
        self._places.update(zip(handles, places, strict=True))
        return np.array(handles, dtype=np.int64)

    def remove(self, handle: int) -> None:
        """Give a slot back; the last one takes its place.

        Raises:
            KeyError: if the handle is not valid.
        """
        place = self._places.pop(handle)
        last = len(self) - 1
        moved = self._handles.pop()
        if place != last:
            self._move(last, place)
            self._handles[place] = moved
            self._places[moved] = place
        if not self._handles:
            self._reserve_entries(ENTRY_BLOCK)

    def places(self, handles: Int64Array) -> Int64Array:
        """The present places of handles, [captions]; KeyError names one that is not valid."""
        return np.array([self._places[int(handle)] for handle in handles], dtype=np.int64)

    def positions(self, places: Int64Array) -> Int64Array:
        """Tokens taken so far, [captions]."""
        return self._positions[places]

    def cross(self, count: int) -> list[Float32Array]:
        """2 L views [count, H, S, D] of the first places."""
        return [store[:count] for store in self._cross]

    def remembered(self, count: int) -> list[Float32Array]:
        """2 L views [count, H, P, D] of the first places."""
        return [store[:count] for store in self._self]

    def descend(self, places: Int64Array, parents: Int64Array, rows: Int64Array) -> None:
        """Let rows continue others: each takes over its parent's mask.

        Args:
            places: [rows], the caption's place of each row.
            parents: [rows], its parent's row within the caption's previous step.
            rows: [rows], its own row within the caption.
        """
        most = int(rows.max()) + 1
        if most > self._visible.shape[1]:
            self._visible = _grown(self._visible, axis=1, size=most, live=len(self))
        self._visible[places, rows] = self._visible[places, parents]

    def entry_bias(self, count: int, most_rows: int) -> Float32Array:
        """[count, 1, most_rows, P]: 0 where a row descends from the entry, else HIDDEN."""
        visible = self._visible[:count, None, :most_rows]
        return np.where(visible, np.float32(0), HIDDEN)

    def append(
        self, places: Int64Array, rows: Int64Array, keys: Float32Array, values: Float32Array
    ) -> None:
        """Remember one new entry per row and advance each caption by one position.

        Args:
            places: [rows], the caption's place of each row.
            rows: [rows], its row within the caption.
            keys: [L, rows, H, D].
            values: [L, rows, H, D].
        """
        entries = self._used[places] + rows
        self._ensure_entries(int(entries.max()) + 1)
        for layer in range(self._geometry.layers):
            self._self[2 * layer][places, :, entries] = keys[layer]
            self._self[2 * layer + 1][places, :, entries] = values[layer]
        self._visible[places, rows, entries] = True
        rows_added = np.bincount(places, minlength=self._capacity)
        self._used += rows_added
        self._positions += rows_added > 0

    def _require_room(self, count: int) -> None:
        if count > self.room:
            raise IndexError(f"there is room for {self.room} captions, not for {count}")

    def _ensure_entries(self, needed: int) -> None:
        present = self._visible.shape[2]
        if needed <= present:
            return
        size = -(-max(needed, 2 * present) // ENTRY_BLOCK) * ENTRY_BLOCK
        live = len(self)
        self._self = [_grown(store, axis=2, size=size, live=live) for store in self._self]
        self._visible = _grown(self._visible, axis=2, size=size, live=live)

    def _reserve_entries(self, entries: int) -> None:
        geometry = self._geometry
        shape = (self._capacity, geometry.heads, entries, geometry.head_dim)
        self._self = [np.zeros(shape, np.float32) for _ in range(2 * geometry.layers)]
        self._visible = np.zeros((self._capacity, 1, entries), np.bool_)

    def _move(self, source: int, target: int) -> None:
        for store in (*self._cross, *self._self, self._visible, self._positions, self._used):
            store[target] = store[source]


def _grown(array: NDArray[_Element], axis: int, size: int, live: int) -> NDArray[_Element]:
    """`array` made `size` long along `axis`; the first `live` places are copied, the rest is zero.

    What is not copied takes no memory until it is used.
    """
    shape = list(array.shape)
    shape[axis] = size
    grown = np.zeros(shape, array.dtype)
    kept = (slice(live), *(slice(length) for length in array.shape[1:]))
    grown[kept] = array[:live]
    return grown
