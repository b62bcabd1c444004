"""The three graphs as PyTorch modules over the checkpoint's own layers.

Dims are named as in core/graph_tensors.py. Each module computes what transformers'
VisionEncoderDecoderModel computes, cut where serving needs it cut:

- EncoderModule: pixels to states, rescale and normalisation included.
- PrefillModule: states to every layer's cross-attention keys and values, once per image.
- StepModule: one token for every row, up to the logits. Remembered keys and values come in and are
  never copied: attention over [remembered | new] is two products whose scores meet in one softmax.
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

    def __init__(self, decoder: nn.Module, projection: nn.Module | None) -> None:
        """Keep the decoder's cross-attention projections and enc_to_dec_proj where there is one."""
        super().__init__()
        self.projection = projection if projection is not None else nn.Identity()
        transformer: Any = decoder.transformer
        self.attentions = nn.ModuleList(block.crossattention for block in transformer.h)

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """float32 [B, S, E] to 2 L arrays float32 [B, H, S, D]."""
        projected = self.projection(states)
        outputs: list[Tensor] = []
        for attention in self.attentions:
            keys, values = _conv1d(attention.c_attn, projected).chunk(2, dim=-1)
            outputs += [_split_heads(keys, attention), _split_heads(values, attention)]
        return tuple(outputs)


class StepModule(nn.Module):
    """One decoding step for every row."""

    def __init__(self, decoder: nn.Module) -> None:
        """Keep the decoder's layers; all but the head stay shared with the checkpoint."""
        super().__init__()
        transformer: Any = decoder.transformer
        head: Any = decoder.lm_head
        # [E, V], as a product wants it, so that a quantised graph can keep it once for both uses.
        self.head = nn.Parameter(head.weight.detach().T.contiguous(), requires_grad=False)
        tied = head.weight is transformer.wte.weight
        self.token_embedding = None if tied else transformer.wte
        self.position_embedding = transformer.wpe
        self.blocks = transformer.h
        self.final_norm = transformer.ln_f

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cell_row: Tensor,
        row_cell: Tensor,
        entry_bias: Tensor,
        cross: list[Tensor],
        remembered: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One step; shapes as in core/graph_tensors.py.

        Returns:
            logits [R, V], log-normalisers [R], attention [R, S], new keys [L, R, H, D] and new
            values [L, R, H, D].
        """
        hidden = self._embedded(tokens) + self.position_embedding(positions)
        new_keys: list[Tensor] = []
        new_values: list[Tensor] = []
        looked_at: list[Tensor] = []
        for layer, block in enumerate(self.blocks):
            memory = remembered[2 * layer], remembered[2 * layer + 1]
            attended, keys, values = _self_attention(
                block.attn, block.ln_1(hidden), memory, cell_row, row_cell, entry_bias
            )
            hidden = hidden + attended
            image = cross[2 * layer], cross[2 * layer + 1]
            attended, weights = _cross_attention(
                block.crossattention, block.ln_cross_attn(hidden), image, cell_row, row_cell
            )
            hidden = hidden + attended
            looked_at.append(weights)
            hidden = hidden + _mlp(block.mlp, block.ln_2(hidden))
            new_keys.append(keys)
            new_values.append(values)
        logits = torch.matmul(self.final_norm(hidden), self.head)
        attention = _to_rows(torch.stack(looked_at).mean(dim=0)[:, None], row_cell)
        return (
            logits,
            _log_normalisers(logits),
            attention,
            torch.stack(new_keys),
            torch.stack(new_values),
        )

    def _embedded(self, tokens: Tensor) -> Tensor:
        """int64 [R] to [R, E]."""
        if self.token_embedding is None:
            return self.head.index_select(1, tokens).T
        embedded: Tensor = self.token_embedding(tokens)
        return embedded


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


def _split_heads(states: Tensor, attention: Any) -> Tensor:
    """[B, N, H * D] to [B, H, N, D]."""
    return _heads_apart(states, attention).transpose(1, 2)


def _heads_apart(states: Tensor, attention: Any) -> Tensor:
    """[..., H * D] to [..., H, D]."""
    apart: Tensor = states.unflatten(-1, (attention.num_heads, attention.head_dim))
    return apart


def _to_grid(rows: Tensor, cell_row: Tensor) -> Tensor:
    """[R, N] to [B, K, N]; written as an embedding, which exports as one Gather."""
    return functional.embedding(cell_row, rows)


def _to_rows(grid: Tensor, row_cell: Tensor) -> Tensor:
    """[B, H, K, D] to [R, H * D]."""
    return functional.embedding(row_cell, grid.transpose(1, 2).flatten(2).flatten(0, 1))


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    return _conv1d(mlp.c_proj, mlp.act(_conv1d(mlp.c_fc, hidden)))


def _self_attention(
    attention: Any,
    hidden: Tensor,
    memory: tuple[Tensor, Tensor],
    cell_row: Tensor,
    row_cell: Tensor,
    entry_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row over the entries it descends from and its own new one.

    Args:
        attention: transformers' GPT2Attention.
        hidden: [R, H * D].
        memory: remembered keys and values, [B, H, P, D] each.
        cell_row: [B, K].
        row_cell: [R].
        entry_bias: [B, 1, K, P].

    Returns:
        attended [R, H * D], new keys [R, H, D], new values [R, H, D].
    """
    projected = _conv1d(attention.c_attn, hidden)
    queries, keys, values = (
        _split_heads(part, attention) for part in _to_grid(projected, cell_row).chunk(3, dim=-1)
    )
    queries = queries * attention.scaling
    past_keys, past_values = memory
    past_scores = torch.matmul(queries, past_keys.transpose(-1, -2)) + entry_bias
    own_scores = (queries * keys).sum(dim=-1, keepdim=True)
    weights = torch.softmax(torch.cat((past_scores, own_scores), dim=-1), dim=-1)
    attended = torch.matmul(weights[..., :-1], past_values) + weights[..., -1:] * values
    _, new_keys, new_values = (_heads_apart(part, attention) for part in projected.chunk(3, dim=-1))
    return _conv1d(attention.c_proj, _to_rows(attended, row_cell)), new_keys, new_values


def _cross_attention(
    attention: Any,
    hidden: Tensor,
    image: tuple[Tensor, Tensor],
    cell_row: Tensor,
    row_cell: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each row over its image's states; an image's beams share keys and values, [B, H, S, D].

    Returns:
        attended [R, H * D], and how much each state was attended to, mean over heads [B, K, S].
    """
    queries = _split_heads(_to_grid(_conv1d(attention.q_attn, hidden), cell_row), attention)
    keys, values = image
    scores = torch.matmul(queries * attention.scaling, keys.transpose(-1, -2))
    weights = torch.softmax(scores, dim=-1)
    attended = torch.matmul(weights, values)
    return _conv1d(attention.c_proj, _to_rows(attended, row_cell)), weights.mean(dim=1)
