"""The shapes of one checkpoint's decoder, which graphs, slots and checks all follow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderGeometry:
    """Shapes of a GPT-2 decoder with cross-attention over ViT states.

    Attributes:
        layers: decoder blocks.
        heads: attention heads of each block.
        head_dim: width of one head.
        image_tokens: encoder states per image; patches plus class and distillation tokens.
        grid_rows: rows of image patches.
        grid_cols: columns of image patches.
        encoder_width: width of an encoder state.
        vocabulary_size: logits per row.
        max_positions: longest sequence the position embeddings allow, start token included.
    """

    layers: int
    heads: int
    head_dim: int
    image_tokens: int
    grid_rows: int
    grid_cols: int
    encoder_width: int
    vocabulary_size: int
    max_positions: int
