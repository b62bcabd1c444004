"""A StepModel over the exported prefill and step graphs and a SlotStore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from captionserve_server.core import graph_tensors as names
from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.slots import SlotStore
from captionserve_server.core.step_model import (
    NO_SLOT,
    Candidates,
    Float32Array,
    Int64Array,
    StepBatch,
)

Array = NDArray[Any]


class Graph(Protocol):
    """Something that runs an exported graph."""

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs, in the graph's order."""


class GraphStepModel:
    """The decoder as its graphs: what decoder_step runs in Triton, and the edge mode in process."""

    def __init__(
        self, prefill_graph: Graph, step_graph: Graph, geometry: DecoderGeometry, capacity: int
    ) -> None:
        """Reserve `capacity` slots."""
        self._prefill_graph = prefill_graph
        self._step_graph = step_graph
        self._geometry = geometry
        self._slots = SlotStore(geometry, capacity)

    def prefill(self, states: Float32Array) -> Int64Array:
        """Project as many images as find room; [images, S, E] to slots [images]."""
        slots = np.full(len(states), NO_SLOT, dtype=np.int64)
        taken = min(len(states), self._slots.room)
        if taken:
            cross = self._prefill_graph.run({names.ENCODER_STATES: states[:taken]})
            for image in range(taken):
                slots[image] = self._slots.add(cross, image)
        return slots

    def step(self, batch: StepBatch) -> Candidates:
        """Run one token of every row; KeyError for a slot that is not held."""
        slots = self._slots
        places = slots.places(batch.slots)
        row_places = np.repeat(places, batch.row_counts)
        rows = _index_within(batch.row_counts)
        count, most_rows = int(places.max()) + 1, int(batch.row_counts.max())
        slots.descend(row_places, batch.parents, rows)
        cell_row = np.zeros((count, most_rows), dtype=np.int64)
        cell_row[row_places, rows] = np.arange(len(rows))
        inputs = {
            names.TOKENS: batch.tokens,
            names.POSITIONS: slots.positions(row_places),
            names.CELL_ROW: cell_row,
            names.ROW_CELL: row_places * most_rows + rows,
            names.ENTRY_BIAS: slots.entry_bias(count, most_rows),
            names.CANDIDATE_RANKS: np.arange(batch.num_candidates),
        }
        layers = self._geometry.layers
        inputs |= dict(zip(names.cross_names(layers), slots.cross(count), strict=True))
        inputs |= dict(zip(names.self_names(layers), slots.remembered(count), strict=True))
        logprobs, tokens, keys, values = self._step_graph.run(inputs)
        slots.append(row_places, rows, keys, values)
        return Candidates(logprobs, tokens)

    def free(self, slots: Int64Array) -> None:
        """Give slots back; KeyError for one that is not held."""
        for slot in slots:
            self._slots.remove(int(slot))


def _index_within(counts: Int64Array) -> Int64Array:
    """[2, 3] to [0, 1, 0, 1, 2]: each element's index within its group."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)
