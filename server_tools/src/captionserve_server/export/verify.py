"""Holding every exported graph against PyTorch, number by number.

The reference for the decoder is transformers' own model run over whole sequences without a cache,
so that the step graph's descent masks, positions and remembered keys are checked too, not only its
layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captionserve_server.core.step_model import Int64Array, RowRequests, StepBatch
from captionserve_server.export.checkpoint import Checkpoint
from captionserve_server.export.precision import Precision
from captionserve_server.export.sources import encoder_module
from captionserve_server.runtime import graph_tensors as names
from captionserve_server.runtime.decoder_graphs import open_decoder
from captionserve_server.runtime.graph_step_model import GraphStepModel
from captionserve_server.runtime.model_repository import ENCODER_GRAPH_FILE, STEP_GRAPH_FILE
from captionserve_server.runtime.open_graph import open_graph

LOGPROB_TOLERANCES = {Precision.FP32: 1e-4, Precision.INT8: 1.0, Precision.INT4: 3.0}
"""Largest accepted absolute difference of a log-probability."""
STATE_TOLERANCES = {Precision.FP32: 1e-3, Precision.INT8: 2.0, Precision.INT4: 2.0}
"""Largest accepted absolute difference of an encoder state; states reach tens."""
_IMAGES = 2
_STEPS = 4
_ROWS = 2
_SEED = 20


class GraphMismatchError(RuntimeError):
    """An exported graph does not compute what PyTorch computes."""


@dataclass(frozen=True)
class Verification:
    """Largest absolute differences between the graphs and PyTorch.

    Attributes:
        encoder_states: over all states of the encoder graph.
        logprobs: over all candidate log-probabilities of prefill and step graphs together.
    """

    encoder_states: float
    logprobs: float


def verify_export(
    checkpoint: Checkpoint, graphs: Mapping[str, Path], precision: Precision
) -> Verification:
    """Compare the exported graphs with PyTorch on random pixels and tokens.

    Args:
        checkpoint: the source.
        graphs: path of each graph by its file name.
        precision: of the graphs; says what difference is accepted.

    Raises:
        GraphMismatchError: if a difference exceeds its tolerance; names graph and difference.
    """
    generator = torch.Generator().manual_seed(_SEED)
    height, width = checkpoint.image_size
    pixels = torch.randint(256, (_IMAGES, 3, height, width), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        states = encoder_module(checkpoint)(pixels)
        state_error = _encoder_error(pixels, states, graphs[ENCODER_GRAPH_FILE])
        _refuse_above(STATE_TOLERANCES[precision], state_error, "encoder")
        logprob_error = _decoder_error(checkpoint, states, graphs, generator)
        _refuse_above(LOGPROB_TOLERANCES[precision], logprob_error, "decoder")
    return Verification(state_error, logprob_error)


def _refuse_above(tolerance: float, error: float, graph: str) -> None:
    # A NaN compares false with everything, so ask for what is right, not for what is wrong.
    if not error <= tolerance:
        raise GraphMismatchError(
            f"the {graph} graph differs from PyTorch by {error:.2g}; "
            f"at most {tolerance:g} is accepted"
        )


def _encoder_error(pixels: Tensor, states: Tensor, path: Path) -> float:
    (exported,) = open_graph(path).run({names.PIXELS: pixels.numpy()})
    return float(np.abs(exported - states.numpy()).max())


def _decoder_error(
    checkpoint: Checkpoint, states: Tensor, graphs: Mapping[str, Path], generator: torch.Generator
) -> float:
    """Decode random tokens along branching rows; compare every step's log-probabilities."""
    geometry = checkpoint.bundle.geometry
    steps = min(_STEPS, geometry.max_positions)
    decoder = open_decoder(graphs[STEP_GRAPH_FILE].parent)
    step_model = GraphStepModel(decoder, geometry, capacity=_IMAGES)
    slots = step_model.prefill(states.numpy())
    rows_of = [1 if step == 0 else _ROWS for step in range(steps)]
    sequences = [torch.empty(0, dtype=torch.int64)] * _IMAGES
    candidates = min(16, geometry.vocabulary_size)
    worst = 0.0
    for step, rows in enumerate(rows_of):
        previous = rows_of[step - 1] if step else 1
        parents = torch.randint(previous, (_IMAGES, rows), generator=generator)
        tokens = torch.randint(geometry.vocabulary_size, (_IMAGES, rows), generator=generator)
        answer = step_model.step(_step_batch(slots, tokens, parents, candidates))
        sequences = [
            _extended(sequence, parents[image], tokens[image])
            for image, sequence in enumerate(sequences)
        ]
        expected = _reference_logprobs(checkpoint, torch.cat(sequences), states, rows)
        chosen = np.take_along_axis(expected.numpy(), answer.tokens.reshape(-1, candidates), axis=1)
        worst = max(worst, float(np.abs(answer.logprobs - chosen.ravel()).max()))
    return worst


def _step_batch(slots: Int64Array, tokens: Tensor, parents: Tensor, candidates: int) -> StepBatch:
    """A step of equally many rows for each slot; tokens and parents [images, rows]."""
    images, rows = tokens.shape
    return StepBatch(
        slots=slots,
        row_counts=np.full(images, rows, dtype=np.int64),
        rows=RowRequests(
            tokens=tokens.flatten().numpy(),
            parents=parents.flatten().numpy(),
            candidate_counts=np.full(images * rows, candidates),
            normalise_first=np.zeros(images * rows, np.bool_),
        ),
    )


def _extended(sequence: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
    """[rows before, length] to [rows, length + 1]."""
    if sequence.numel() == 0:
        return tokens[:, None]
    return torch.cat((sequence[parents], tokens[:, None]), dim=1)


def _reference_logprobs(
    checkpoint: Checkpoint, sequences: Tensor, states: Tensor, rows: int
) -> Tensor:
    """Transformers' log-probabilities after each whole sequence; float32 [images * rows, V]."""
    projection = getattr(checkpoint.model, "enc_to_dec_proj", None)
    seen = states if projection is None else projection(states)
    logits = checkpoint.model.decoder(
        input_ids=sequences,
        encoder_hidden_states=seen.repeat_interleave(rows, dim=0),
        use_cache=False,
    ).logits
    return torch.log_softmax(logits[:, -1].float(), dim=-1)
