"""Writing the three graphs as ONNX files."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from captionserve_server.core import graph_tensors as names
from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.export.checkpoint import Checkpoint
from captionserve_server.export.modules import EncoderModule, PrefillModule, StepModule, TopModule

# The first with Gelu, which is a fifth of the time of its parts.
OPSET = 20
# protobuf's limit is 2 GiB; a graph near it keeps its weights in a file beside it.
_EXTERNAL_DATA_BYTES = 1_800_000_000


@dataclass(frozen=True)
class StepShape:
    """Sizes of one step's arrays, as in core/graph_tensors.py.

    Attributes:
        rows_per_caption: live beams of each of the captions.
        entries: P, remembered entries per caption.
    """

    rows_per_caption: tuple[int, ...] = (2, 3)
    entries: int = 5


def encoder_module(checkpoint: Checkpoint) -> EncoderModule:
    """The checkpoint's encoder as a graph."""
    return EncoderModule(checkpoint.model.encoder, checkpoint.preprocessor)


def prefill_module(checkpoint: Checkpoint) -> PrefillModule:
    """The checkpoint's cross-attention projections as a graph."""
    projection = getattr(checkpoint.model, "enc_to_dec_proj", None)
    return PrefillModule(checkpoint.model.decoder, projection)


def step_module(checkpoint: Checkpoint) -> StepModule:
    """The checkpoint's decoder as a graph."""
    return StepModule(checkpoint.model.decoder)


def export_encoder(checkpoint: Checkpoint, path: Path) -> None:
    """Write the encoder graph."""
    height, width = checkpoint.image_size
    pixels = torch.zeros(2, 3, height, width, dtype=torch.uint8)
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


def step_example(
    geometry: DecoderGeometry, shape: StepShape, generator: torch.Generator | None = None
) -> tuple[Tensor | list[Tensor], ...]:
    """Inputs of StepModule: random keys and values, every row descending from every other entry.

    Args:
        geometry: the decoder's shapes.
        shape: sizes of the step.
        generator: source of the random numbers; PyTorch's own when None.
    """
    counts = shape.rows_per_caption
    captions, most, rows = len(counts), max(counts), sum(counts)
    cells = [caption * most + row for caption, count in enumerate(counts) for row in range(count)]
    row_cell = torch.tensor(cells)
    cell_row = torch.zeros(captions * most, dtype=torch.int64)
    cell_row[row_cell] = torch.arange(rows)
    bias = torch.zeros(captions, 1, most, shape.entries)
    bias[..., 1::2] = -1e30

    def arrays(length: int) -> list[Tensor]:
        dims = (captions, geometry.heads, length, geometry.head_dim)
        return [torch.randn(dims, generator=generator) for _ in range(2 * geometry.layers)]

    return (
        torch.randint(geometry.vocabulary_size, (rows,), generator=generator),
        torch.randint(geometry.max_positions, (rows,), generator=generator),
        cell_row.view(captions, most),
        row_cell,
        bias,
        arrays(geometry.image_tokens),
        arrays(shape.entries),
    )


def _step_dims(layers: int) -> tuple[object, ...]:
    rows, captions, most = Dim("rows"), Dim("captions"), Dim("most_rows")
    entries = Dim("entries")
    return (
        {0: rows},
        {0: rows},
        {0: captions, 1: most},
        {0: rows},
        {0: captions, 2: most, 3: entries},
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
