"""What graphs are exported from: a checkpoint's modules, and example inputs of the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.export.checkpoint import Checkpoint
from captionserve_server.export.modules import EncoderModule, PrefillModule, StepModule


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
    panels = checkpoint.bundle.geometry.value_panels
    return PrefillModule(checkpoint.model.decoder, projection, panels)


def step_module(checkpoint: Checkpoint) -> StepModule:
    """The checkpoint's decoder as a graph."""
    return StepModule(checkpoint.model.decoder)


def step_example(
    geometry: DecoderGeometry, shape: StepShape, generator: torch.Generator | None = None
) -> tuple[Tensor | list[Tensor], ...]:
    """Inputs of StepModule: random keys and values, every row descending from half of the past.

    Args:
        geometry: the decoder's shapes.
        shape: sizes of the step.
        generator: source of the random numbers; PyTorch's own when None.
    """
    counts = shape.rows_per_caption
    captions, most, rows = len(counts), max(counts), sum(counts)
    cells = [caption * most + row for caption, count in enumerate(counts) for row in range(count)]
    row_cell = torch.tensor(cells)
    firsts = torch.tensor([sum(counts[:caption]) for caption in range(captions)])
    cell_row = firsts.repeat_interleave(most)
    cell_row[row_cell] = torch.arange(rows)
    past_bias = torch.zeros(captions, 1, most, shape.entries)
    past_bias[..., 1::2] = -1e30
    own_bias = torch.full((most, most), -1e30).fill_diagonal_(0).expand(captions, 1, -1, -1)

    remembered_shape = (geometry.heads, shape.entries, geometry.head_dim)

    def arrays(*shapes: tuple[int, ...]) -> list[Tensor]:
        """Keys and values of all layers, [captions, *shape]."""
        return [
            torch.randn((captions, *each), generator=generator)
            for _ in range(geometry.layers)
            for each in shapes
        ]

    return (
        torch.randint(geometry.vocabulary_size, (rows,), generator=generator),
        torch.randint(geometry.max_positions, (rows,), generator=generator),
        cell_row.view(captions, most),
        row_cell,
        torch.cat((past_bias, own_bias), dim=-1),
        arrays(*geometry.image_shapes),
        arrays(remembered_shape, remembered_shape),
    )
