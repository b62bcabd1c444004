"""Names of the exported graphs' inputs and outputs, shared by export, runtime and slots.

Letters used for dims, here and wherever the graphs' arrays are documented:

    B captions    K most rows of any caption    R rows (live beams of all captions)
    L layers      H heads                       D width of a head
    S image tokens                              P remembered entries per caption    C candidates
    E encoder width                             V vocabulary
    W panels of an image's values

Rows are what the decoder computes: one per live beam, packed without gaps. Attention over what a
caption's beams share wants them in a [B, K] grid instead; CELL_ROW and ROW_CELL map between the
two.
"""

from __future__ import annotations

PIXELS = "PIXELS"
"""uint8 [B, 3, height, width], 0 to 255."""
ENCODER_STATES = "ENCODER_STATES"
"""float32 [B, S, E]."""

TOKENS = "tokens"
"""int64 [R], the newest token of each row."""
POSITIONS = "positions"
"""int64 [R], the position of that token; 0 is the decoder start token."""
CELL_ROW = "cell_row"
"""int64 [B, K], the row in each cell of the grid; a caption's cells beyond its rows repeat its
first one."""
ROW_CELL = "row_cell"
"""int64 [R], the flat cell (caption x K + beam) of each row."""
ENTRY_BIAS = "entry_bias"
"""float32 [B, 1, K, P + K], 0 where a beam descends from the entry, else a large negative number.
The last K entries are those that this step adds, each beam's own."""
LOGITS = "logits"
"""float32 [R, V]."""
LOG_NORMALISERS = "log_normalisers"
"""float32 [R], log(sum(exp(logits)))."""
ATTENTION = "attention"
"""float32 [R, S], cross-attention, mean over layers and heads."""
NEW_PROJECTIONS = "new_projections"
"""float32 [L * R, 3 * H * D], this step's self-attention queries, keys and values by layers."""

CANDIDATE_RANKS = "candidate_ranks"
"""int64 [C]; only its length counts, it says how many of the best to find."""
BEST = "best"
"""float32 [R, C], the highest logits, descending."""
BEST_TOKENS = "best_tokens"
"""int64 [R, C], their tokens."""


def cross_names(layers: int) -> list[str]:
    """Names of the cross-attention arrays: each layer's keys, then values.

    Keys are float32 [B, H, 1, S, D], values [B, H, W, S, D / W].
    """
    return [f"cross_{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]


def self_names(layers: int) -> list[str]:
    """Names of the remembered self-attention arrays, float32 [B, H, P, D]: keys, then values."""
    return [f"self_{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]


def step_input_names(layers: int) -> list[str]:
    """All inputs of the step graph, in order."""
    head = [TOKENS, POSITIONS, CELL_ROW, ROW_CELL, ENTRY_BIAS]
    return head + cross_names(layers) + self_names(layers)


def step_output_names() -> list[str]:
    """All outputs of the step graph, in order."""
    return [LOGITS, LOG_NORMALISERS, ATTENTION, NEW_PROJECTIONS]
