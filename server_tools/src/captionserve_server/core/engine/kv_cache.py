"""The KV cache: where the decoder's keys and values live between steps.

Each caption owns one slot: the cross-attention keys and values of its image, and a growing memory
of self-attention entries, one per row and step. Entries are only ever appended. Beams that part or
die move nothing: each row has a mask of the entries it descends from, and attention skips the
others.

A step reads the first places of every array, so that what it reads is a view, never a copy. A slot
that is given back leaves a gap; whoever comes next takes it. Gaps that are left when a step begins
are closed by moving the last slots. Callers hold handles, which are not reused.

Invariants:
    1. A handle is valid from `add` until `remove`, and names one place.
    2. After `close_gaps`, places 0 .. len(self) - 1 are occupied, the others are not.
    3. An entry, once written, is not changed until its caption is removed.
    4. An entry that its caption has not written is 0: hidden entries are multiplied by 0, too, and
       a number that is none would spread.
"""

from __future__ import annotations

import heapq
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.step_model import Float32Array, Int64Array

# Entries are reserved in blocks of this many: attention runs over all of them, used or not, and
# memory is laid anew whenever more are needed.
ENTRY_BLOCK = 16
# Memory for up to so many entries is kept for reuse: touching fresh pages costs as much as filling
# them. More is needed rarely, and given back.
_KEPT_ENTRIES = 64
# Added to the score of an entry that a row does not descend from; exp() of it is 0 in float32.
HIDDEN = np.float32(-1.0e30)


_Element = TypeVar("_Element", bound=np.generic)


class KVCache:
    """Keys, values and descent of all live captions."""

    def __init__(self, geometry: DecoderGeometry, capacity: int) -> None:
        """Reserve room for `capacity` captions; the pages are touched only when used."""
        self._capacity = capacity
        self._cross = [
            np.zeros((capacity, *shape), np.float32)
            for _ in range(geometry.layers)
            for shape in geometry.image_shapes
        ]
        self._places: dict[int, int] = {}
        self._handles: dict[int, int] = {}
        self._free = list(range(capacity))
        self._next_handle = 0
        self._positions = np.zeros(capacity, np.int64)
        self._used = np.zeros(capacity, np.int64)
        self._memory = _EntryMemory(geometry, capacity)
        self._visible: NDArray[np.bool_] = np.zeros((capacity, 1, ENTRY_BLOCK), np.bool_)

    def __len__(self) -> int:
        """Captions in slots."""
        return len(self._places)

    @property
    def entries(self) -> int:
        """Self-attention entries remembered for all captions."""
        return int(self._used[list(self._handles)].sum())

    @property
    def room(self) -> int:
        """Captions that could still be taken in."""
        return len(self._free)

    def next_cross(self) -> list[Float32Array]:
        """2 L views, where the next caption's keys and values are to be written.

        Shapes are [1, *shape] of the geometry's `image_shapes`, layer by layer.

        Raises:
            IndexError: if there is no room.
        """
        place = self._next_place()
        return [store[place : place + 1] for store in self._cross]

    def add(self) -> int:
        """Take a caption in whose keys and values have been written to `next_cross()`.

        Returns:
            its handle.

        Raises:
            IndexError: if there is no room.
        """
        place = self._next_place()
        heapq.heappop(self._free)
        handle = self._next_handle
        self._next_handle += 1
        self._places[handle] = place
        self._handles[place] = handle
        self._positions[place] = self._used[place] = 0
        self._visible[place] = False
        self._memory.clear(place)
        return handle

    def remove(self, handle: int) -> None:
        """Give a slot back.

        Raises:
            KeyError: if the handle is not valid.
        """
        place = self._places.pop(handle)
        del self._handles[place]
        heapq.heappush(self._free, place)
        if not self._handles:
            self._memory.shrink()
            self._visible = np.zeros((self._capacity, 1, ENTRY_BLOCK), np.bool_)

    def close_gaps(self) -> None:
        """Move the last slots into the gaps, so that the first places are all occupied."""
        while self._free and self._free[0] < len(self):
            gap, last = heapq.heappop(self._free), max(self._handles)
            self._move(last, gap)
            handle = self._handles.pop(last)
            self._handles[gap] = handle
            self._places[handle] = gap
            heapq.heappush(self._free, last)

    def places(self, handles: Int64Array) -> Int64Array:
        """The present places of handles, [captions]; KeyError names one that is not valid."""
        return np.array([self._places[int(handle)] for handle in handles], dtype=np.int64)

    def positions(self, places: Int64Array) -> Int64Array:
        """Tokens taken so far, [captions]."""
        return self._positions[places]

    def cross_of(self, handle: int) -> list[Float32Array]:
        """2 L views [1, *shape] of one caption's; KeyError for a handle that is not valid."""
        place = self._places[handle]
        return [store[place : place + 1] for store in self._cross]

    def cross(self, count: int) -> list[Float32Array]:
        """2 L views [count, *shape] of the first places, as `next_cross` has one."""
        return [store[:count] for store in self._cross]

    def remembered(self, count: int) -> list[Float32Array]:
        """2 L views [count, H, P, D] of the first places."""
        return self._memory.views(count)

    def descend(self, places: Int64Array, parents: Int64Array, rows: Int64Array) -> None:
        """Let rows continue others: each takes over its parent's mask. Gaps must be closed.

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
        """[count, 1, most_rows, P + most_rows]: 0 where a row descends from the entry, else HIDDEN.

        The last ones are those about to be appended, of which each row descends from its own.
        """
        visible = self._visible[:count, :most_rows]
        own = np.broadcast_to(np.eye(most_rows, dtype=np.bool_), (count, most_rows, most_rows))
        descends = np.concatenate((visible, own), axis=2)
        return np.where(descends[:, None], np.float32(0), HIDDEN)

    def append(
        self, places: Int64Array, rows: Int64Array, keys: Float32Array, values: Float32Array
    ) -> None:
        """Remember one new entry per row and advance each caption by one position. No gaps.

        Args:
            places: [rows], the caption's place of each row.
            rows: [rows], its row within the caption.
            keys: [L, rows, H, D].
            values: [L, rows, H, D].
        """
        entries = self._used[places] + rows
        self._ensure_entries(int(entries.max()) + 1)
        self._memory.write(places, entries, keys, values)
        self._visible[places, rows, entries] = True
        rows_added = np.bincount(places, minlength=self._capacity)
        self._used += rows_added
        self._positions += rows_added > 0

    def _next_place(self) -> int:
        if not self._free:
            raise IndexError("there is no room for another caption")
        return self._free[0]

    def _ensure_entries(self, needed: int) -> None:
        present = self._memory.entries
        if needed <= present:
            return
        size = -(-max(needed, 2 * present) // ENTRY_BLOCK) * ENTRY_BLOCK
        self._memory.grow(size, len(self))
        self._visible = _grown(self._visible, axis=2, size=size, live=len(self))

    def _move(self, source: int, target: int) -> None:
        self._memory.move(source, target)
        for store in (*self._cross, self._visible, self._positions, self._used):
            store[target] = store[source]


class _EntryMemory:
    """Self-attention keys and values: [2, L, places, H, P, D], keys first."""

    def __init__(self, geometry: DecoderGeometry, capacity: int) -> None:
        self._geometry = geometry
        self._capacity = capacity
        self._kept: dict[int, Float32Array] = {}
        self._stores = self._of_size(ENTRY_BLOCK)

    @property
    def entries(self) -> int:
        """P, entries that a place has room for."""
        return self._stores.shape[4]

    def views(self, count: int) -> list[Float32Array]:
        """2 L views [count, H, P, D] of the first places: each layer's keys, then values."""
        return [
            self._stores[kind, layer, :count]
            for layer in range(self._geometry.layers)
            for kind in (0, 1)
        ]

    def write(
        self, places: Int64Array, entries: Int64Array, keys: Float32Array, values: Float32Array
    ) -> None:
        """Set entries of places, both [rows], to [L, rows, H, D]."""
        for store, new in zip(self._stores, (keys, values), strict=True):
            # Two index arrays apart from each other: their dimension comes first.
            store[:, places, :, entries] = new.swapaxes(0, 1)

    def clear(self, place: int) -> None:
        """Set all of a place's entries to 0."""
        self._stores[:, :, place] = 0

    def move(self, source: int, target: int) -> None:
        """Copy a place's entries to another's."""
        self._stores[:, :, target] = self._stores[:, :, source]

    def grow(self, entries: int, live: int) -> None:
        """Make room for so many entries; those of the first `live` places stay."""
        present, self._stores = self._stores, self._of_size(entries)
        before = present.shape[4]
        self._stores[:, :, :live, :, :before] = present[:, :, :live]
        self._stores[:, :, :live, :, before:] = 0

    def shrink(self) -> None:
        """Go back to the least room; what the entries are is forgotten."""
        self._stores = self._of_size(ENTRY_BLOCK)

    def _of_size(self, entries: int) -> Float32Array:
        if entries in self._kept:
            return self._kept[entries]
        geometry = self._geometry
        places = (2, geometry.layers, self._capacity, geometry.heads)
        stores = np.zeros((*places, entries, geometry.head_dim), np.float32)
        if entries <= _KEPT_ENTRIES:
            self._kept[entries] = stores
        return stores


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
