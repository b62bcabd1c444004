"""The `decoder_step` model: owns the slots and runs the decoder's graphs.

One model with three operations, because they share memory that must not leave the process:

    PREFILL  IMAGE_STATES                   -> NEW_SLOTS
    STEP     SLOTS, ROW_COUNTS, TOKENS, ... -> CANDIDATE_*, PROBE_LOGPROBS, ATTENTION
    FREE     SLOTS                          -> nothing

Each is done for an OWNER, whose slots nobody else reaches; see core/slot_owners.py. Every tensor of
a call costs some 0.05 ms: arrays of STEP that have no elements are left out, in both directions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from captionserve_server.core.bundle import (
    BUNDLE_FILE,
    PREFILL_GRAPH_FILE,
    STEP_GRAPH_FILE,
    TOP_GRAPH_FILE,
    Bundle,
)
from captionserve_server.core.errors import InvalidRequestError
from captionserve_server.core.slot_owners import SlotOwners
from captionserve_server.core.step_model import (
    NO_SLOT,
    RowRequests,
    ScoreEdits,
    StepAnswer,
    StepBatch,
)
from captionserve_server.runtime.graph_step_model import DecoderGraphs, GraphStepModel
from captionserve_server.runtime.open_graph import find_graph, open_graph
from captionserve_server.runtime.timed_graph import TimedGraph
from captionserve_server.triton import wire
from captionserve_server.triton.metrics import Counter, Gauge
from captionserve_server.triton.pace import Pace
from captionserve_server.triton.pb import (
    Array,
    ModelArguments,
    Request,
    error_response,
    read_or_empty,
    read_required,
    response,
)
from captionserve_server.triton.wire import TensorSpec

PREFILL = "PREFILL"
STEP = "STEP"
FREE = "FREE"

# By their names in DecoderGraphs.
_GRAPH_FILES = {
    "prefill": PREFILL_GRAPH_FILE,
    "step": STEP_GRAPH_FILE,
    "top": TOP_GRAPH_FILE,
}


class TritonPythonModel:
    """StepModels behind Triton's interface, one for each owner."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graphs and run each once, so that the first caption finds them warm."""
        arguments = ModelArguments(args)
        folder = Path(arguments.repository) / str(arguments.version)
        geometry = Bundle.from_json((folder / BUNDLE_FILE).read_text()).geometry
        threads = arguments.threads("intra_op_thread_count")
        spinning = bool(arguments.number("spinning"))
        timed = {
            role: TimedGraph(
                open_graph(find_graph(folder, name), threads=threads, spinning=spinning)
            )
            for role, name in _GRAPH_FILES.items()
        }
        graphs = DecoderGraphs(**timed)
        capacity = arguments.number("slots")
        self._owners = SlotOwners(
            lambda: GraphStepModel(graphs, geometry, capacity),
            capacity,
            lease_seconds=arguments.number("lease_seconds"),
            clock=time.monotonic,
        )
        _warm_up(GraphStepModel(graphs, geometry, 1), geometry.image_tokens, geometry.encoder_width)
        self._metrics = _Metrics(arguments.version, capacity, timed)
        self._pace = Pace()
        self._operations = {PREFILL: self._prefill, STEP: self._step, FREE: self._free}

    def execute(self, requests: list[Request]) -> list[Any]:
        """Run the requests' operations in their order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Any:
        try:
            name = _text(request, wire.OPERATION)
            if name not in self._operations:
                raise InvalidRequestError(f"OPERATION must be one of {', '.join(self._operations)}")
            memory = self._owners.memory_of(_text(request, wire.OWNER))
            answer = self._operations[name](memory, request)
            # A step changes no slot; what it changes can wait.
            if name != STEP or self._pace.is_due():
                self._metrics.show(self._owners.memories)
            return answer
        except Exception as error:  # Whatever goes wrong is this request's answer.
            return error_response(error)

    def _prefill(self, memory: GraphStepModel, request: Request) -> Any:
        states = read_required(request, wire.IMAGE_STATES)
        slots = np.full(len(states), NO_SLOT, np.int64)
        taken = min(len(states), self._owners.room)
        slots[:taken] = memory.prefill(states[:taken])
        return response({wire.NEW_SLOTS: slots})

    def _step(self, memory: GraphStepModel, request: Request) -> Any:
        return response(answer_tensors(memory.step(_step_batch(request))))

    def _free(self, memory: GraphStepModel, request: Request) -> Any:
        memory.free(read_required(request, wire.SLOTS))
        return response({})


class _Metrics:
    """The slots' use and the graphs' time among Triton's metrics."""

    def __init__(self, version: int, capacity: int, graphs: Mapping[str, TimedGraph]) -> None:
        labels = {"version": str(version)}
        self._capacity = Gauge(
            "captionserve_slots", "Captions that can be decoded at once.", labels
        )
        self._capacity.set(capacity)
        self._used = Gauge("captionserve_slots_used", "Captions being decoded.", labels)
        self._bytes = Gauge(
            "captionserve_slot_bytes_used", "Memory of the keys and values in use.", labels
        )
        self._seconds = [
            (
                graph,
                Counter(f"captionserve_{name}_seconds_total", f"Time in the {name} graph.", labels),
            )
            for name, graph in graphs.items()
        ]
        self.show([])

    def show(self, memories: list[GraphStepModel]) -> None:
        """Show what the memories hold now, and how long the graphs have run."""
        self._used.set(sum(memory.slots_used for memory in memories))
        self._bytes.set(sum(memory.bytes_used for memory in memories))
        for graph, counter in self._seconds:
            counter.raise_to(graph.seconds)


def step_tensors(batch: StepBatch) -> dict[TensorSpec, Array]:
    """A step as the tensors of STEP; those without elements are left out."""
    rows = batch.rows
    arrays = (
        batch.slots,
        batch.row_counts,
        rows.tokens,
        rows.parents,
        rows.candidate_counts,
        rows.normalise_first,
        rows.edits.rows,
        rows.edits.tokens,
        rows.edits.factors,
        rows.probe_rows,
        rows.probe_tokens,
        rows.attention_rows,
    )
    return _with_elements((*wire.STEP_ROW_INPUTS, *wire.STEP_EXTRA_INPUTS), arrays)


def _step_batch(request: Request) -> StepBatch:
    """The step that the tensors of STEP describe."""
    slots, row_counts, tokens, parents, counts, normalise = (
        read_required(request, spec) for spec in wire.STEP_ROW_INPUTS
    )
    edit_rows, edit_tokens, edit_factors, probe_rows, probe_tokens, attention_rows = (
        read_or_empty(request, spec) for spec in wire.STEP_EXTRA_INPUTS
    )
    return StepBatch(
        slots=slots,
        row_counts=row_counts,
        rows=RowRequests(
            tokens=tokens,
            parents=parents,
            candidate_counts=counts,
            normalise_first=normalise,
            edits=ScoreEdits(edit_rows, edit_tokens, edit_factors),
            probe_rows=probe_rows,
            probe_tokens=probe_tokens,
            attention_rows=attention_rows,
        ),
    )


def answer_tensors(answer: StepAnswer) -> dict[TensorSpec, Array]:
    """A step's answer as the tensors of STEP; those without elements are left out."""
    arrays = (answer.logprobs, answer.tokens, answer.probe_logprobs, answer.attention)
    return _with_elements(wire.STEP_OUTPUTS, arrays)


def _with_elements(
    specs: tuple[TensorSpec, ...], arrays: tuple[Array, ...]
) -> dict[TensorSpec, Array]:
    pairs = zip(specs, arrays, strict=True)
    return {spec: array for spec, array in pairs if array.size}


def _text(request: Request, spec: TensorSpec) -> str:
    return bytes(read_required(request, spec)[0]).decode()


def _warm_up(step_model: GraphStepModel, image_tokens: int, encoder_width: int) -> None:
    slots = step_model.prefill(np.zeros((1, image_tokens, encoder_width), np.float32))
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    rows = RowRequests(zero, zero, one, np.zeros(1, np.bool_))
    step_model.step(StepBatch(slots, one, rows))
    step_model.free(slots)
