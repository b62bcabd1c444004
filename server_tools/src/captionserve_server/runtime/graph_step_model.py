"""A StepModel over the exported prefill and step graphs and a SlotStore."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core.engine.kv_cache import SlotStore
from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.search.selection import select
from captionserve_server.core.step_model import (
    NO_SLOT,
    Float32Array,
    Int64Array,
    StepAnswer,
    StepBatch,
)
from captionserve_server.runtime import graph_tensors as names

Array = NDArray[Any]


class Graph(Protocol):
    """Something that runs an exported graph."""

    def run(
        self, inputs: Mapping[str, Array], into: Mapping[str, Array] | None = None
    ) -> list[Array]:
        """All outputs, in the graph's order; those named in `into` are written there."""


@dataclass(frozen=True)
class DecoderGraphs:
    """The decoder's exported graphs.

    Attributes:
        prefill: encoder states to cross-attention keys and values.
        step: one token of every row to logits.
        top: logits to the best tokens.
    """

    prefill: Graph
    step: Graph
    top: Graph


class GraphStepModel:
    """The decoder as its graphs: what decoder_step runs in Triton, and the edge mode in process."""

    def __init__(self, graphs: DecoderGraphs, geometry: DecoderGeometry, capacity: int) -> None:
        """Reserve `capacity` slots."""
        self._graphs = graphs
        self._geometry = geometry
        self._slots = SlotStore(geometry, capacity)
        # Where the large outputs of every step are written, so that their pages are touched once.
        self._pages: dict[str, Float32Array] = {}

    @property
    def slots_used(self) -> int:
        """Captions in slots."""
        return len(self._slots)

    @property
    def bytes_used(self) -> int:
        """Memory of the keys and values of the captions in slots."""
        geometry = self._geometry
        per_token = 2 * geometry.layers * geometry.heads * geometry.head_dim * 4
        return per_token * (len(self._slots) * geometry.image_tokens + self._slots.entries)

    def prefill(self, states: Float32Array) -> Int64Array:
        """Project as many images as find room; [images, S, E] to slots [images]."""
        slots = np.full(len(states), NO_SLOT, dtype=np.int64)
        cross_names = names.cross_names(self._geometry.layers)
        for index in range(min(len(states), self._slots.room)):
            # One by one: free places need not be neighbours, and one image fills a product.
            self._graphs.prefill.run(
                {names.ENCODER_STATES: states[index : index + 1]},
                into=dict(zip(cross_names, self._slots.next_cross(), strict=True)),
            )
            slots[index] = self._slots.add()
        return slots

    def step(self, batch: StepBatch) -> StepAnswer:
        """Run one token of every row; KeyError for a slot that is not held."""
        slots, requests = self._slots, batch.rows
        slots.close_gaps()
        places = slots.places(batch.slots)
        row_places = np.repeat(places, batch.row_counts)
        rows = _index_within(batch.row_counts)
        slots.descend(row_places, requests.parents, rows)
        inputs = self._inputs(row_places, rows, requests.tokens)
        large = self._large_outputs(len(rows))
        logits, normalisers, attention, projections = self._graphs.step.run(inputs, into=large)
        slots.append(row_places, rows, *self._keys_and_values(projections))
        logprobs, tokens, probes = select(logits, normalisers, requests, self._top)
        return StepAnswer(logprobs, tokens, probes, attention[requests.attention_rows])

    def free(self, slots: Int64Array) -> None:
        """Give slots back; KeyError for one that is not held."""
        for slot in slots:
            self._slots.remove(int(slot))

    def _inputs(
        self, row_places: Int64Array, rows: Int64Array, tokens: Int64Array
    ) -> dict[str, Array]:
        """The step graph's inputs for rows, given their places and numbers within their caption."""
        slots, layers = self._slots, self._geometry.layers
        count, most_rows = int(row_places.max()) + 1, int(rows.max()) + 1
        cell_row = np.zeros((count, most_rows), dtype=np.int64)
        cell_row[row_places[rows == 0]] = np.flatnonzero(rows == 0)[:, None]
        cell_row[row_places, rows] = np.arange(len(rows))
        inputs = {
            names.TOKENS: tokens,
            names.POSITIONS: slots.positions(row_places),
            names.CELL_ROW: cell_row,
            names.ROW_CELL: row_places * most_rows + rows,
            names.ENTRY_BIAS: slots.entry_bias(count, most_rows),
        }
        inputs |= dict(zip(names.cross_names(layers), slots.cross(count), strict=True))
        inputs |= dict(zip(names.self_names(layers), slots.remembered(count), strict=True))
        return inputs

    def _large_outputs(self, rows: int) -> dict[str, Float32Array]:
        """Where a step of so many rows is to write logits and projections."""
        of = self._geometry
        shapes = {
            names.LOGITS: (rows, of.vocabulary_size),
            names.NEW_PROJECTIONS: (of.layers * rows, 3 * of.heads * of.head_dim),
        }
        return {name: self._kept_pages(name, shape) for name, shape in shapes.items()}

    def _keys_and_values(self, projections: Float32Array) -> tuple[Float32Array, Float32Array]:
        """[L * R, 3 * H * D] to views [L, R, H, D]."""
        of = self._geometry
        apart = projections.reshape(of.layers, -1, 3, of.heads, of.head_dim)
        return apart[:, :, 1], apart[:, :, 2]

    def _kept_pages(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        size = math.prod(shape)
        if name not in self._pages or size > len(self._pages[name]):
            self._pages[name] = np.empty(size, np.float32)
        return self._pages[name][:size].reshape(shape)

    def _top(self, logits: Float32Array, count: int) -> tuple[Float32Array, Int64Array]:
        best, tokens = self._graphs.top.run(
            {names.LOGITS: logits, names.CANDIDATE_RANKS: np.arange(count)}
        )
        return best, tokens


def _index_within(counts: Int64Array) -> Int64Array:
    """[2, 3] to [0, 1, 0, 1, 2]: each element's index within its group."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)
