"""Writing the graphs as TorchScript files.

Traced from the same modules as the ONNX graphs, then frozen: weights become constants, so that no
file holds anything twice. A trace may take a size for a constant, so every size that varies is
another one here than in `verify_export`, where such a graph would fail.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

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
from captionserve_server.runtime.torchscript_graph import NAMES_FILE

_IMAGES = 3
_STEP = StepShape(rows_per_caption=(2, 3, 1), entries=5)


def export_encoder(checkpoint: Checkpoint, path: Path) -> None:
    """Write the encoder graph."""
    height, width = checkpoint.image_size
    pixels = torch.zeros(_IMAGES, 3, height, width, dtype=torch.uint8)
    module = encoder_module(checkpoint)
    with without_mask(checkpoint.model.encoder):
        _export(module, (pixels,), [names.PIXELS], [names.ENCODER_STATES], path)


def export_prefill(checkpoint: Checkpoint, path: Path) -> None:
    """Write the prefill graph."""
    geometry = checkpoint.bundle.geometry
    states = torch.zeros(_IMAGES, geometry.image_tokens, geometry.encoder_width)
    outputs = names.cross_names(geometry.layers)
    _export(prefill_module(checkpoint), (states,), [names.ENCODER_STATES], outputs, path)


def export_step(checkpoint: Checkpoint, path: Path) -> None:
    """Write the step graph."""
    geometry = checkpoint.bundle.geometry
    parts = [part if isinstance(part, list) else [part] for part in step_example(geometry, _STEP)]
    _export(
        _FlatStep(step_module(checkpoint), geometry.layers),
        tuple(tensor for part in parts for tensor in part),
        names.step_input_names(geometry.layers),
        names.step_output_names(),
        path,
    )


def export_top(checkpoint: Checkpoint, path: Path) -> None:
    """Write the graph that finds the best tokens."""
    logits = torch.zeros(3, checkpoint.bundle.geometry.vocabulary_size)
    _export(
        TopModule(),
        (logits, torch.arange(5)),
        [names.LOGITS, names.CANDIDATE_RANKS],
        [names.BEST, names.BEST_TOKENS],
        path,
    )


class _FlatStep(nn.Module):
    """StepModule whose arguments are single tensors, so that each has a name."""

    def __init__(self, step: nn.Module, layers: int) -> None:
        super().__init__()
        self.step = step
        self._per_kind = 2 * layers

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Tensors in the order of `step_input_names`; returns what StepModule does."""
        memory = len(inputs) - self._per_kind
        image = memory - self._per_kind
        outputs: tuple[Tensor, ...] = self.step(
            *inputs[:image], list(inputs[image:memory]), list(inputs[memory:])
        )
        return outputs


def _export(
    module: nn.Module,
    example: tuple[Tensor, ...],
    input_names: list[str],
    output_names: list[str],
    path: Path,
) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        # Transformers checks the images' size, which does not vary; and torch.jit warns that it is
        # deprecated, see docs/adr/0010.
        warnings.simplefilter("ignore")
        graph = torch.jit.freeze(torch.jit.trace(module.eval(), example, check_trace=False))
        carried = {NAMES_FILE: json.dumps({"inputs": input_names, "outputs": output_names})}
        torch.jit.save(graph, str(path), _extra_files=carried)
