"""The `decoder_step` model: owns the slots and runs the prefill and step graphs.

One model with three operations, because they share memory that must not leave the process:

    PREFILL  IMAGE_STATES                                        -> NEW_SLOTS
    STEP     SLOTS, ROW_COUNTS, TOKENS, PARENTS, NUM_CANDIDATES  -> CANDIDATE_*
    FREE     SLOTS                                               -> nothing
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from captionserve_server.core import tensors
from captionserve_server.core.bundle import (
    BUNDLE_FILE,
    PREFILL_GRAPH_FILE,
    STEP_GRAPH_FILE,
    Bundle,
)
from captionserve_server.core.errors import InvalidRequestError
from captionserve_server.core.graph_step_model import GraphStepModel
from captionserve_server.core.step_model import StepBatch
from captionserve_server.runtime.onnx_graph import OnnxGraph
from captionserve_server.triton.requests import (
    ModelArguments,
    Request,
    error_response,
    read_required,
    response,
)

PREFILL = "PREFILL"
STEP = "STEP"
FREE = "FREE"


class TritonPythonModel:
    """The StepModel behind Triton's interface."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load both graphs and run each once, so that the first caption finds them warm."""
        arguments = ModelArguments(args)
        folder = Path(arguments.repository) / str(arguments.version)
        geometry = Bundle.from_json((folder / BUNDLE_FILE).read_text()).geometry
        threads = arguments.number("intra_op_thread_count")
        self._step_model = GraphStepModel(
            OnnxGraph(folder / PREFILL_GRAPH_FILE, threads=threads),
            OnnxGraph(folder / STEP_GRAPH_FILE, threads=threads),
            geometry,
            arguments.number("slots"),
        )
        _warm_up(self._step_model, geometry.image_tokens, geometry.encoder_width)
        self._operations = {PREFILL: self._prefill, STEP: self._step, FREE: self._free}

    def execute(self, requests: list[Request]) -> list[Any]:
        """Run the requests' operations in their order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Any:
        try:
            name = bytes(read_required(request, tensors.OPERATION)[0]).decode()
            if name not in self._operations:
                raise InvalidRequestError(f"OPERATION must be one of {', '.join(self._operations)}")
            return self._operations[name](request)
        except Exception as error:  # Whatever goes wrong is this request's answer.
            return error_response(error)

    def _prefill(self, request: Request) -> Any:
        slots = self._step_model.prefill(read_required(request, tensors.IMAGE_STATES))
        return response({tensors.NEW_SLOTS: slots})

    def _step(self, request: Request) -> Any:
        batch = StepBatch(
            slots=read_required(request, tensors.SLOTS),
            row_counts=read_required(request, tensors.ROW_COUNTS),
            tokens=read_required(request, tensors.TOKENS),
            parents=read_required(request, tensors.PARENTS),
            num_candidates=int(read_required(request, tensors.NUM_CANDIDATES)[0]),
        )
        candidates = self._step_model.step(batch)
        return response(
            {
                tensors.CANDIDATE_LOGPROBS: candidates.logprobs,
                tensors.CANDIDATE_TOKENS: candidates.tokens,
            }
        )

    def _free(self, request: Request) -> Any:
        self._step_model.free(read_required(request, tensors.SLOTS))
        return response({})


def _warm_up(step_model: GraphStepModel, image_tokens: int, encoder_width: int) -> None:
    slots = step_model.prefill(np.zeros((1, image_tokens, encoder_width), np.float32))
    zero = np.zeros(1, np.int64)
    step_model.step(StepBatch(slots, np.ones(1, np.int64), zero, zero, num_candidates=1))
    step_model.free(slots)
