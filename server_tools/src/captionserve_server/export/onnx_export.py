"""Writing the three graphs as ONNX files."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.export import Dim

from captionserve_server.export.checkpoint import Checkpoint
from captionserve_server.export.modules import TopModule, without_mask
from captionserve_server.export.sources import (
    StepShape,
    encoder_module,
    prefill_module,
    step_example,
    step_module,
)
from captionserve_server.runtime import graph_tensors as names

# The first with Gelu, which is a fifth of the time of its parts.
OPSET = 20
# protobuf's limit is 2 GiB; a graph near it keeps its weights in a file beside it.
_EXTERNAL_DATA_BYTES = 1_800_000_000


def export_encoder(checkpoint: Checkpoint, path: Path) -> None:
    """Write the encoder graph."""
    height, width = checkpoint.image_size
    pixels = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    with without_mask(checkpoint.model.encoder):
        _export(
            encoder_module(checkpoint),
            (pixels,),
            ({0: Dim("images")},),
            [names.PIXELS],
            [names.ENCODER_STATES],
            path,
        )


def export_prefill(checkpoint: Checkpoint, path: Path) -> None:
    """Write the prefill graph."""
    geometry = checkpoint.bundle.geometry
    states = torch.zeros(2, geometry.image_tokens, geometry.encoder_width)
    _export(
        prefill_module(checkpoint),
        (states,),
        ({0: Dim("images")},),
        [names.ENCODER_STATES],
        names.cross_names(geometry.layers),
        path,
    )


def export_step(checkpoint: Checkpoint, path: Path) -> None:
    """Write the step graph."""
    geometry = checkpoint.bundle.geometry
    _export(
        step_module(checkpoint),
        step_example(geometry, StepShape()),
        _step_dims(geometry.layers),
        names.step_input_names(geometry.layers),
        names.step_output_names(),
        path,
    )


def export_top(checkpoint: Checkpoint, path: Path) -> None:
    """Write the graph that finds the best tokens."""
    vocabulary = checkpoint.bundle.geometry.vocabulary_size
    _export(
        TopModule(),
        (torch.zeros(2, vocabulary), torch.arange(4)),
        ({0: Dim("rows")}, {0: Dim("candidates")}),
        [names.LOGITS, names.CANDIDATE_RANKS],
        [names.BEST, names.BEST_TOKENS],
        path,
    )


def _step_dims(layers: int) -> tuple[object, ...]:
    rows, captions, most = Dim("rows"), Dim("captions"), Dim("most_rows")
    entries = Dim("entries")
    return (
        {0: rows},
        {0: rows},
        {0: captions, 1: most},
        {0: rows},
        # The last is entries + most_rows, which is found to be so.
        {0: captions, 2: most, 3: Dim.AUTO},
        [{0: captions}] * (2 * layers),
        [{0: captions, 2: entries}] * (2 * layers),
    )


def _export(
    module: nn.Module,
    example: tuple[object, ...],
    dims: tuple[object, ...],
    input_names: list[str],
    output_names: list[str],
    path: Path,
) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        # The exporter warns of its own internals, not of the model.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=dims,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    program.save(str(path), external_data=size > _EXTERNAL_DATA_BYTES)
    onnx.checker.check_model(str(path))
