"""The slot store against a plain model of it: a dictionary of lists."""

from __future__ import annotations

import numpy as np
import pytest
from captionserve_server.core.engine.kv_cache import ENTRY_BLOCK, KVCache
from captionserve_server.core.geometry import DecoderGeometry
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

GEOMETRY = DecoderGeometry(
    layers=2,
    heads=2,
    head_dim=3,
    image_tokens=4,
    grid_rows=1,
    grid_cols=3,
    encoder_width=5,
    vocabulary_size=7,
    max_positions=400,
)
CAPACITY = 4


def added(store: KVCache, image: float) -> int:
    """Take a caption in whose keys and values are the image's number; its handle."""
    for array in store.next_cross():
        array[:] = image
    return store.add()


class KVCacheMachine(RuleBasedStateMachine):
    """Adds, steps and removes captions; every row's visible entries must be its own history."""

    def __init__(self) -> None:
        super().__init__()
        self.store = KVCache(GEOMETRY, CAPACITY)
        # handle -> (image number, history of entry numbers for each row)
        self.captions: dict[int, tuple[float, list[list[float]]]] = {}
        # handle -> entries written so far
        self.used: dict[int, int] = {}
        self.counter = 0.0

    @precondition(lambda self: len(self.captions) < CAPACITY)
    @rule()
    def add(self) -> None:
        self.counter += 1
        handle = added(self.store, self.counter)
        assert handle not in self.captions
        self.captions[handle] = (self.counter, [[]])
        self.used[handle] = 0

    @precondition(lambda self: self.captions)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.captions)))
        self.store.remove(handle)
        del self.captions[handle]
        with pytest.raises(KeyError):
            self.store.remove(handle)

    @precondition(lambda self: self.captions)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        handles = data.draw(
            st.lists(st.sampled_from(sorted(self.captions)), min_size=1, unique=True)
        )
        self.store.close_gaps()
        assert sorted(self.store.places(np.array(sorted(self.captions)))) == list(
            range(len(self.captions))
        )
        places, rows, parents, entries = [], [], [], []
        for handle in handles:
            image, histories = self.captions[handle]
            count = data.draw(st.integers(1, 4))
            chosen = data.draw(
                st.lists(st.integers(0, len(histories) - 1), min_size=count, max_size=count)
            )
            after = []
            for row, parent in enumerate(chosen):
                self.counter += 1
                after.append([*histories[parent], self.counter])
                places.append(int(self.store.places(np.array([handle]))[0]))
                rows.append(row)
                parents.append(parent)
                entries.append(self.counter)
            self.captions[handle] = (image, after)
            self.used[handle] += len(after)
        place_array, row_array = np.array(places), np.array(rows)
        self.store.descend(place_array, np.array(parents), row_array)
        shape = (GEOMETRY.layers, len(rows), GEOMETRY.heads, GEOMETRY.head_dim)
        keys = np.broadcast_to(np.array(entries, np.float32)[None, :, None, None], shape)
        self.store.append(place_array, row_array, keys, -keys)

    @invariant()
    def rows_see_their_own_history_and_nothing_else(self) -> None:
        assert len(self.store) == len(self.captions)
        assert self.store.room == CAPACITY - len(self.captions)
        for handle, (image, histories) in self.captions.items():
            place = int(self.store.places(np.array([handle]))[0])
            assert (self.store.cross(CAPACITY)[0][place] == image).all()
            bias = self.store.entry_bias(CAPACITY, len(histories))[place, 0]
            for layer in range(GEOMETRY.layers):
                keys = self.store.remembered(CAPACITY)[2 * layer][place, 0, :, 0]
                values = self.store.remembered(CAPACITY)[2 * layer + 1][place, 0, :, 0]
                for row, history in enumerate(histories):
                    descends = bias[row, : len(keys)] == 0
                    assert sorted(keys[descends]) == history
                    assert sorted(-values[descends]) == history
            of_new_entries = bias[:, -len(histories) :] == 0
            assert (of_new_entries == np.eye(len(histories))).all()
            steps = len(histories[0])
            assert int(self.store.positions(np.array([place]))[0]) == steps

    @invariant()
    def what_a_caption_has_not_written_is_zero(self) -> None:
        for handle in self.captions:
            (place,) = self.store.places(np.array([handle]))
            used = self.used[handle]
            for array in self.store.remembered(CAPACITY):
                assert (array[place, :, :used] != 0).all()
                assert (array[place, :, used:] == 0).all()

    @invariant()
    def what_a_step_reads_is_a_view(self) -> None:
        count = len(self.captions)
        for array in (*self.store.cross(count), *self.store.remembered(count)):
            assert array.flags.c_contiguous
            assert array.base is not None


KVCacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestKVCache = KVCacheMachine.TestCase


def test_entries_grow_beyond_the_first_block_and_shrink_when_empty() -> None:
    store = KVCache(GEOMETRY, CAPACITY)
    handle = added(store, 1)
    place, row = np.zeros(1, np.int64), np.zeros(1, np.int64)
    keys = np.ones((GEOMETRY.layers, 1, GEOMETRY.heads, GEOMETRY.head_dim), np.float32)
    for _ in range(ENTRY_BLOCK + 1):
        store.descend(place, row, row)
        store.append(place, row, keys, keys)

    assert store.remembered(1)[0].shape[2] > ENTRY_BLOCK
    # The last one is the entry to come.
    assert (store.entry_bias(1, 1) == 0).sum() == ENTRY_BLOCK + 1 + 1
    store.remove(handle)
    assert store.remembered(1)[0].shape[2] == ENTRY_BLOCK


def test_numbers_that_are_none_do_not_outlive_their_caption() -> None:
    store = KVCache(GEOMETRY, CAPACITY)
    zero = np.zeros(1, np.int64)
    none = np.full((GEOMETRY.layers, 1, GEOMETRY.heads, GEOMETRY.head_dim), np.nan, np.float32)
    for _ in range(2):
        handle = added(store, 1)
        assert all((array == 0).all() for array in store.remembered(1))
        for _ in range(ENTRY_BLOCK + 1):
            store.descend(zero, zero, zero)
            store.append(zero, zero, none, none)
        store.remove(handle)


def test_a_full_store_refuses() -> None:
    store = KVCache(GEOMETRY, 1)
    added(store, 1)
    with pytest.raises(IndexError, match="room"):
        store.next_cross()
    with pytest.raises(IndexError, match="room"):
        store.add()
