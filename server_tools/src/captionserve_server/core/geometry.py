"""The shapes of one checkpoint's decoder, which graphs, slots and checks all follow."""

from __future__ import annotations

from dataclasses import dataclass

_PANEL_WIDTH = 32


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

    @property
    def value_panels(self) -> int:
        """W, the panels of columns in which an image's values stand, one after the other.

        A product reads its right matrix a few columns at a time. Where these lie together, it takes
        a quarter less time for 4 rows; docs/adr/0013 has what was measured.
        """
        return self.head_dim // _PANEL_WIDTH if self.head_dim % _PANEL_WIDTH == 0 else 1

    @property
    def image_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of an image's keys and values in each layer: [H, 1, S, D] and [H, W, S, D / W]."""
        panels, width = self.value_panels, self.head_dim // self.value_panels
        return (
            (self.heads, 1, self.image_tokens, self.head_dim),
            (self.heads, panels, self.image_tokens, width),
        )
