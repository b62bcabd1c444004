"""A StepModel over the exported prefill and step graphs and a KV cache."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from captionserve_server.core.engine.kv_cache import HIDDEN, KVCache
from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.search.selection import select
from captionserve_server.core.step_model import (
    Float32Array,
    ForcedRows,
    Int64Array,
    RowRequests,
    StepAnswer,
    StepBatch,
)
from captionserve_server.runtime import graph_tensors as names
from captionserve_server.runtime.decoder_graphs import DecoderGraphs
from captionserve_server.runtime.graph import Array

# Products of one row add in another order than those of several (MatMulNBits), and quantised
# activations make more of such a difference than a score may move: a lone row goes twice.
_FEWEST_ROWS = 2


class GraphStepModel:
    """The decoder as its graphs, with the keys and values of the captions that it has taken in.

    Attributes:
        graphs: which it runs.
    """

    def __init__(self, graphs: DecoderGraphs, geometry: DecoderGeometry, capacity: int) -> None:
        """Reserve `capacity` slots."""
        self.graphs = graphs
        self._geometry = geometry
        self._cache = KVCache(geometry, capacity)
        # Where the outputs of every step are written, so that their pages are touched once.
        self._pages: dict[str, Float32Array] = {}

    @property
    def bytes_used(self) -> int:
        """Memory of the keys and values of the captions in slots."""
        geometry = self._geometry
        per_token = 2 * geometry.layers * geometry.heads * geometry.head_dim * 4
        return per_token * (len(self._cache) * geometry.image_tokens + self._cache.entries)

    def warm_up(self) -> None:
        """Run each graph once: the first run allocates and plans."""
        of = self._geometry
        slots = self.prefill(np.zeros((1, of.image_tokens, of.encoder_width), np.float32))
        zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
        self.step(StepBatch(slots, one, RowRequests(zero, zero, one, np.zeros(1, np.bool_))))
        self.free(slots)

    def prefill(self, states: Float32Array) -> Int64Array:
        """Project images and keep them; [images, S, E] to slots [images].

        Raises:
            IndexError: if there is no room for all of them.
        """
        cross_names = names.cross_names(self._geometry.layers)
        slots: list[int] = []
        try:
            for image in range(len(states)):
                # One by one: free places need not be neighbours, and one image fills a product.
                self.graphs.prefill.run(
                    {names.ENCODER_STATES: states[image : image + 1]},
                    into=dict(zip(cross_names, self._cache.next_cross(), strict=True)),
                )
                slots.append(self._cache.add())
        except BaseException:
            for slot in slots:
                self._cache.remove(slot)
            raise
        return np.array(slots, np.int64)

    def step(self, batch: StepBatch) -> StepAnswer:
        """Run one token of every row; KeyError for a slot that is not held."""
        cache, requests = self._cache, batch.rows
        cache.close_gaps()
        places = cache.places(batch.slots)
        row_places = np.repeat(places, batch.row_counts)
        rows = _index_within(batch.row_counts)
        cache.descend(row_places, requests.parents, rows)
        inputs = self._inputs(row_places, rows, requests.tokens)
        count = len(rows)
        outputs = self._outputs(max(count, _FEWEST_ROWS))
        logits, normalisers, attention, projections = self.graphs.step.run(inputs, into=outputs)
        cache.append(row_places, rows, *self._keys_and_values(projections, count))
        logprobs, tokens, probes = select(logits[:count], normalisers[:count], requests, self._top)
        return StepAnswer(logprobs, tokens, probes, attention[requests.attention_rows])

    def free(self, slots: Int64Array) -> None:
        """Give slots back; KeyError, before any is given back, for one that is not held."""
        self._cache.places(slots)
        for slot in slots:
            self._cache.remove(int(slot))

    def forced_logprobs(self, slot: int | None, rows: ForcedRows) -> Float32Array:
        """Run all rows at once, as those of a caption without memory; KeyError as `step`."""
        count, layers = len(rows.tokens), self._geometry.layers
        cross = self._no_image if slot is None else self._cache.cross_of(slot)
        inputs: dict[str, Array] = {
            names.TOKENS: rows.tokens,
            names.POSITIONS: rows.positions,
            names.CELL_ROW: np.arange(count)[None],
            names.ROW_CELL: np.arange(count),
            names.ENTRY_BIAS: np.where(rows.sees, np.float32(0), HIDDEN)[None, None],
        }
        inputs |= dict(zip(names.cross_names(layers), cross, strict=True))
        nothing = np.zeros((1, self._geometry.heads, 0, self._geometry.head_dim), np.float32)
        inputs |= dict.fromkeys(names.self_names(layers), nothing)
        logits, normalisers, *_ = self.graphs.step.run(
            _doubled_if_alone(inputs), into=self._outputs(max(count, _FEWEST_ROWS))
        )
        logprobs: Float32Array = (
            logits[rows.probe_rows, rows.probe_tokens] - normalisers[rows.probe_rows]
        )
        return logprobs

    @cached_property
    def _no_image(self) -> list[Array]:
        """Cross-attention keys and values of no image: of states that are all 0."""
        of = self._geometry
        states = np.zeros((1, of.image_tokens, of.encoder_width), np.float32)
        return self.graphs.prefill.run({names.ENCODER_STATES: states})

    def _inputs(
        self, row_places: Int64Array, rows: Int64Array, tokens: Int64Array
    ) -> dict[str, Array]:
        """The step graph's inputs for rows, given their places and numbers within their caption."""
        cache, layers = self._cache, self._geometry.layers
        count, most_rows = int(row_places.max()) + 1, int(rows.max()) + 1
        cell_row = np.zeros((count, most_rows), dtype=np.int64)
        cell_row[row_places[rows == 0]] = np.flatnonzero(rows == 0)[:, None]
        cell_row[row_places, rows] = np.arange(len(rows))
        inputs: dict[str, Array] = {
            names.TOKENS: tokens,
            names.POSITIONS: cache.positions(row_places),
            names.CELL_ROW: cell_row,
            names.ROW_CELL: row_places * most_rows + rows,
            names.ENTRY_BIAS: cache.entry_bias(count, most_rows),
        }
        inputs |= dict(zip(names.cross_names(layers), cache.cross(count), strict=True))
        inputs |= dict(zip(names.self_names(layers), cache.remembered(count), strict=True))
        return _doubled_if_alone(inputs)

    def _outputs(self, rows: int) -> dict[str, Float32Array]:
        """Where a step of so many rows is to write."""
        of = self._geometry
        shapes: dict[str, tuple[int, ...]] = {
            names.LOGITS: (rows, of.vocabulary_size),
            names.LOG_NORMALISERS: (rows,),
            names.ATTENTION: (rows, of.image_tokens),
            names.NEW_PROJECTIONS: (of.layers * rows, 3 * of.heads * of.head_dim),
        }
        return {name: self._kept_pages(name, shape) for name, shape in shapes.items()}

    def _keys_and_values(
        self, projections: Float32Array, rows: int
    ) -> tuple[Float32Array, Float32Array]:
        """[L * R, 3 * H * D] to views [L, rows, H, D]."""
        of = self._geometry
        apart = projections.reshape(of.layers, -1, 3, of.heads, of.head_dim)[:, :rows]
        return apart[:, :, 1], apart[:, :, 2]

    def _kept_pages(self, name: str, shape: tuple[int, ...]) -> Float32Array:
        size = math.prod(shape)
        if name not in self._pages or size > len(self._pages[name]):
            self._pages[name] = np.empty(size, np.float32)
        return self._pages[name][:size].reshape(shape)

    def _top(self, logits: Float32Array, count: int) -> tuple[Float32Array, Int64Array]:
        best, tokens = self.graphs.top.run(
            {names.LOGITS: logits, names.CANDIDATE_RANKS: np.arange(count)}
        )
        return best, tokens


def _doubled_if_alone(inputs: dict[str, Array]) -> dict[str, Array]:
    """The step graph's inputs, with a lone row given _FEWEST_ROWS times."""
    if len(inputs[names.TOKENS]) >= _FEWEST_ROWS:
        return inputs
    rows = (names.TOKENS, names.POSITIONS, names.ROW_CELL)
    return inputs | {name: np.repeat(inputs[name], _FEWEST_ROWS) for name in rows}


def _index_within(counts: Int64Array) -> Int64Array:
    """[2, 3] to [0, 1, 0, 1, 2]: each element's index within its group."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) - np.repeat(ends - counts, counts)
