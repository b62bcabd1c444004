"""A StepModel that asks the `decoder_step` model of this Triton server."""

from __future__ import annotations

import numpy as np

from captionserve_server.core import tensors
from captionserve_server.core.step_model import (
    Candidates,
    Float32Array,
    Int64Array,
    StepBatch,
)
from captionserve_server.triton.decoder_step import FREE, PREFILL, STEP
from captionserve_server.triton.requests import call_model, text_array


class TritonStepModel:
    """decoder_step of one version, called from inside Triton."""

    def __init__(self, version: int) -> None:
        """Bind to decoder_step's `version`."""
        self._version = version

    def prefill(self, states: Float32Array) -> Int64Array:
        """[images, S, E] to slots [images]; NO_SLOT where there was no room."""
        (slots,) = call_model(
            tensors.DECODER_STEP,
            self._version,
            {tensors.OPERATION: text_array(PREFILL), tensors.IMAGE_STATES: states},
            tensors.NEW_SLOTS,
        )
        return slots

    def step(self, batch: StepBatch) -> Candidates:
        """One token of every row."""
        logprobs, tokens = call_model(
            tensors.DECODER_STEP,
            self._version,
            {
                tensors.OPERATION: text_array(STEP),
                tensors.SLOTS: batch.slots,
                tensors.ROW_COUNTS: batch.row_counts,
                tensors.TOKENS: batch.tokens,
                tensors.PARENTS: batch.parents,
                tensors.NUM_CANDIDATES: np.array([batch.num_candidates], np.int64),
            },
            tensors.CANDIDATE_LOGPROBS,
            tensors.CANDIDATE_TOKENS,
        )
        return Candidates(logprobs, tokens)

    def free(self, slots: Int64Array) -> None:
        """Give slots back."""
        call_model(
            tensors.DECODER_STEP,
            self._version,
            {tensors.OPERATION: text_array(FREE), tensors.SLOTS: slots},
        )
