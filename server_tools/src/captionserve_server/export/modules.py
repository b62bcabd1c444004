"""The three graphs as PyTorch modules over the checkpoint's own layers.

Dims are named as in core/graph_tensors.py. Each module computes what transformers'
VisionEncoderDecoderModel computes, cut where serving needs it cut:

- EncoderModule: pixels to states, rescale and normalisation included.
- PrefillModule: states to every layer's cross-attention keys and values, once per image.
- StepModule: one token for every row, up to the logits. Remembered keys and values come in and are
  never copied: attention over [remembered | new] is two products whose scores meet in one softmax.
  With few rows each operator costs more than what it computes, so there are as few as will do.
- TopModule: the best tokens of each row's logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from captionserve_server.core.preprocessing import PreprocessorConfig

_UNMASKED = "captionserve_unmasked"


def _unmasked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of everything to everything; [B, H, S, D] each to [B, S, H, D].

    The interface is transformers' AttentionInterface.
    """
    weights = torch.softmax(torch.matmul(query * scaling, key.transpose(2, 3)), dim=-1)
    return torch.matmul(weights, value).transpose(1, 2), None


AttentionInterface.register(_UNMASKED, _unmasked_attention)


@contextmanager
def without_mask(encoder: PreTrainedModel) -> Iterator[None]:
    """Spare an encoder the mask that hides nothing; transformers' own attention exports one."""
    own = encoder.config._attn_implementation
    encoder.set_attn_implementation(_UNMASKED)
    try:
        yield
    finally:
        encoder.set_attn_implementation(own)


class EncoderModule(nn.Module):
    """uint8 pixels to encoder states."""

    def __init__(self, encoder: nn.Module, preprocessor: PreprocessorConfig) -> None:
        """Keep the encoder and the constants of its image processor."""
        super().__init__()
        self.encoder = encoder
        scale = preprocessor.rescale_factor if preprocessor.do_rescale else 1.0
        mean = preprocessor.image_mean if preprocessor.do_normalize else (0.0, 0.0, 0.0)
        std = preprocessor.image_std if preprocessor.do_normalize else (1.0, 1.0, 1.0)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, height, width] to float32 [B, S, E]."""
        scale, mean, std = (self.get_buffer(name) for name in ("scale", "mean", "std"))
        normalised = (pixels.to(torch.float32) * scale - mean) / std
        states: Tensor = self.encoder(normalised).last_hidden_state
        return states


class PrefillModule(nn.Module):
    """Encoder states to the cross-attention keys and values of all layers."""

    def __init__(self, decoder: nn.Module, projection: nn.Module | None, value_panels: int) -> None:
        """Keep the decoder's cross-attention projections and enc_to_dec_proj where there is one."""
        super().__init__()
        self.value_panels = value_panels
        self.projection = projection if projection is not None else nn.Identity()
        transformer: Any = decoder.transformer
        self.attentions = nn.ModuleList(block.crossattention for block in transformer.h)

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """float32 [B, S, E] to each layer's keys [B, H, 1, S, D] and values [B, H, W, S, D / W]."""
        projected = self.projection(states)
        outputs: list[Tensor] = []
        for attention in self.attentions:
            keys, values = _conv1d(attention.c_attn, projected).chunk(2, dim=-1)
            outputs.append(_split_heads(keys, attention))
            outputs.append(_split_heads(values, attention, self.value_panels))
        return tuple(outputs)


class StepModule(nn.Module):
    """One decoding step for every row."""

    def __init__(self, decoder: nn.Module) -> None:
        """Keep the decoder's layers, shared with the checkpoint."""
        super().__init__()
        transformer: Any = decoder.transformer
        self.token_embedding = transformer.wte
        self.position_embedding = transformer.wpe
        self.blocks = transformer.h
        self.final_norm = transformer.ln_f
        self.head: Any = decoder.lm_head

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cell_row: Tensor,
        row_cell: Tensor,
        entry_bias: Tensor,
        cross: list[Tensor],
        remembered: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step; shapes as in core/graph_tensors.py.

        Returns:
            logits [R, V], log-normalisers [R], attention [R, S], new queries, keys and values
            [L * R, 3 * H * D].
        """
        hidden = self.token_embedding(tokens) + self.position_embedding(positions)
        projections: list[Tensor] = []
        looked_at: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            memory = remembered[2 * layer], remembered[2 * layer + 1]
            attended, projected = _self_attention(
                block.attn, block.ln_1(hidden), memory, cell_row, row_cell, entry_bias
            )
            hidden = hidden + attended
            image = cross[2 * layer], cross[2 * layer + 1]
            attended, weights = _cross_attention(
                block.crossattention, block.ln_cross_attn(hidden), image, cell_row, row_cell
            )
            hidden = hidden + attended
            hidden = hidden + _mlp(block.mlp, block.ln_2(hidden))
            projections.append(projected)
            looked_at.append(weights)
        logits = self.head(self.final_norm(hidden))
        attention = _to_rows(torch.cat(looked_at, dim=1).mean(dim=1), row_cell)
        return logits, _log_normalisers(logits), attention, torch.cat(projections)


class TopModule(nn.Module):
    """The best tokens of each row."""

    def forward(self, logits: Tensor, candidate_ranks: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [R, V] and int64 [C] to the best logits and their tokens, [R, C]."""
        best, tokens = torch.topk(logits, candidate_ranks.shape[0], dim=-1)
        return best, tokens


def _log_normalisers(logits: Tensor) -> Tensor:
    """log(sum(exp(logits))), [R, V] to [R].

    By way of log_softmax, of which ONNX Runtime takes a seventh of the time of its LogSumExp.
    """
    return logits[:, 0] - torch.log_softmax(logits, dim=-1)[:, 0]


def _conv1d(layer: Any, inputs: Tensor) -> Tensor:
    """Transformers' Conv1D: a linear layer whose weight is stored [in, out]."""
    outputs: Tensor = torch.matmul(inputs, layer.weight) + layer.bias
    return outputs


def _split_heads(states: Tensor, attention: Any, panels: int = 1) -> Tensor:
    """[B, N, H * D] to [B, H, panels, N, D / panels]."""
    apart: Tensor = states.unflatten(-1, (attention.num_heads, panels, -1))
    return apart.permute(0, 2, 3, 1, 4)


def _to_grid(rows: Tensor, cell_row: Tensor) -> Tensor:
    """[R, N] to [B, K, N]; written as an embedding, which exports as one Gather."""
    return functional.embedding(cell_row, rows)


def _to_rows(grid: Tensor, row_cell: Tensor) -> Tensor:
    """[B, ..., K, N] to [R, ... * N]."""
    return functional.embedding(row_cell, grid.movedim(-2, 1).flatten(2).flatten(0, 1))


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    return _conv1d(mlp.c_proj, mlp.act(_conv1d(mlp.c_fc, hidden)))


def _self_attention(
    attention: Any,
    hidden: Tensor,
    memory: tuple[Tensor, Tensor],
    cell_row: Tensor,
    row_cell: Tensor,
    entry_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each row over the entries it descends from and its own new one.

    Args:
        attention: transformers' GPT2Attention.
        hidden: [R, H * D].
        memory: remembered keys and values, [B, H, P, D] each.
        cell_row: [B, K].
        row_cell: [R].
        entry_bias: [B, 1, K, P + K].

    Returns:
        attended [R, H * D], new queries, keys and values [R, 3 * H * D].
    """
    projected = _conv1d(attention.c_attn, hidden)
    apart = _to_grid(projected, cell_row).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    queries, keys, values = apart.chunk(3, dim=1)
    past_keys, past_values = memory
    past = past_keys.shape[2]
    scores = (
        _scaled_scores(queries, past_keys, attention.scaling),
        _scaled_scores(queries, keys, attention.scaling),
    )
    weights = torch.softmax(torch.cat(scores, dim=-1) + entry_bias, dim=-1)
    attended = torch.matmul(weights[..., :past], past_values)
    attended = attended + torch.matmul(weights[..., past:], values)
    return _conv1d(attention.c_proj, _to_rows(attended, row_cell)), projected


def _scaled_scores(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """[..., K, D] and [..., N, D] to [..., K, N]."""
    return torch.matmul(queries, keys.transpose(-1, -2)) * scaling


def _cross_attention(
    attention: Any,
    hidden: Tensor,
    image: tuple[Tensor, Tensor],
    cell_row: Tensor,
    row_cell: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each row over its image's states; an image's beams share keys and values.

    Args:
        attention: transformers' GPT2Attention.
        hidden: [R, H * D].
        image: keys [B, H, 1, S, D] and values [B, H, W, S, D / W].
        cell_row: [B, K].
        row_cell: [R].

    Returns:
        attended [R, H * D], and how much each state was attended to, mean over heads
        [B, 1, 1, K, S].
    """
    queries = _split_heads(_to_grid(_conv1d(attention.q_attn, hidden), cell_row), attention)
    keys, values = image
    weights = torch.softmax(_scaled_scores(queries, keys, attention.scaling), dim=-1)
    attended = torch.matmul(weights, values)
    looked_at = weights.mean(dim=1, keepdim=True)
    return _conv1d(attention.c_proj, _to_rows(attended, row_cell)), looked_at
