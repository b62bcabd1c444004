"""The cost model against PyTorch's own count of operations, and its limits against hand counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captionserve_server.bench.cost_model import (
    MachineRates,
    Stage,
    images_per_second_at_most,
    stages_of,
)
from captionserve_server.export.precision import Precision
from captionserve_server.export.random_checkpoint import make_checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import VisionEncoderDecoderModel

from tests.checkpoints import RANDOM_CHECKPOINTS

CONFIG = SimpleNamespace(
    encoder=SimpleNamespace(
        model_type="vit",
        image_size=(4, 4),
        patch_size=2,
        num_channels=3,
        hidden_size=8,
        num_hidden_layers=2,
        intermediate_size=32,
    ),
    decoder=SimpleNamespace(n_embd=6, n_layer=3, n_inner=None, vocab_size=50),
)


@pytest.fixture(scope="module", params=["projected", "deit"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, RANDOM_CHECKPOINTS[request.param].shape, seed=0)
    # Eager attention is made of products, which the counter knows.
    loaded: Any = VisionEncoderDecoderModel.from_pretrained(folder, attn_implementation="eager")
    return loaded.eval()


def flops(*stages: Stage) -> float:
    return sum(stage.weight_flops + stage.float_flops for stage in stages)


@torch.no_grad()
def test_encoding_costs_what_pytorch_counts(model: Any) -> None:
    size = model.config.encoder.image_size
    model.encoder.pooler = None  # Captioning does without.
    with FlopCounterMode(display=False) as counter:
        model.encoder(torch.zeros(1, 3, size, size))
    encode, _, _ = stages_of(model.config, batch=1, num_beams=1, tokens=1)
    assert flops(encode) == counter.get_total_flops()


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_decoding_costs_what_pytorch_counts(model: Any, num_beams: int) -> None:
    tokens, size = 4, model.config.encoder.image_size
    states = model.encoder(torch.zeros(1, 3, size, size)).last_hidden_state
    has_projection = model.config.encoder.hidden_size != model.config.decoder.n_embd
    with FlopCounterMode(display=False) as counter:
        # transformers projects the states at every call; once is enough.
        projected = model.enc_to_dec_proj(states) if has_projection else states
        output = model.decoder(torch.zeros(1, 1, dtype=torch.long), encoder_hidden_states=projected)
        output.past_key_values.batch_repeat_interleave(num_beams)
        for _ in range(tokens - 1):
            output = model.decoder(
                torch.zeros(num_beams, 1, dtype=torch.long),
                encoder_hidden_states=projected.repeat(num_beams, 1, 1),
                past_key_values=output.past_key_values,
            )
    _, prefill, steps = stages_of(model.config, batch=1, num_beams=num_beams, tokens=tokens)
    assert flops(prefill, steps) == counter.get_total_flops()


def test_weights_are_those_of_the_model(model: Any) -> None:
    encode, prefill, steps = stages_of(model.config, batch=1, num_beams=1, tokens=1)
    decoder = model.decoder.transformer
    crossing = [block.crossattention.c_attn.weight for block in decoder.h]
    own = [each for each in decoder.h.parameters() if each.dim() == 2]
    embedded = model.encoder.embeddings.patch_embeddings.projection.weight
    blocks = [
        each
        for name, each in model.encoder.named_parameters()
        if each.dim() == 2 and not name.startswith("pooler")
    ]
    assert encode.weights == embedded.numel() + sum(each.numel() for each in blocks)
    projection = model.config.encoder.hidden_size * model.config.decoder.n_embd
    if model.config.encoder.hidden_size == model.config.decoder.n_embd:
        projection = 0
    assert prefill.weights == projection + sum(each.numel() for each in crossing)
    assert steps.weights == (
        model.decoder.lm_head.weight.numel()
        + sum(each.numel() for each in own)
        - sum(each.numel() for each in crossing)
    )


def test_a_batch_shares_weights_but_not_work() -> None:
    alone = stages_of(CONFIG, batch=1, num_beams=4, tokens=3)
    together = stages_of(CONFIG, batch=8, num_beams=4, tokens=3)
    for one, many in zip(alone, together, strict=True):
        assert one.weights == 8 * many.weights
        assert flops(one) == flops(many)
        assert one.state_bytes == many.state_bytes


def test_what_a_step_reads_by_hand() -> None:
    steps = stages_of(CONFIG, batch=1, num_beams=2, tokens=3)[2]
    cross = 2 * 3 * 5 * 6 * 4  # Keys and values, layers, image tokens, width, bytes.
    entry = 2 * 3 * 6 * 4
    # One entry at the first step; then two rows with two and with three each.
    assert steps.state_bytes == 3 * cross + (1 + 2 * 2 + 2 * 3) * entry


STAGE = Stage(weight_flops=100, float_flops=20, weights=40, state_bytes=8)


@pytest.mark.parametrize(
    ("precision", "seconds"),
    [
        # 100 + 20 operations at 10 a second; 40 weights of 4 bytes and 8 bytes at 20 a second.
        (Precision.FP32, 12.0),
        # 100 at 50 and 20 at 10; 40 weights of a byte and 8 bytes.
        (Precision.INT8, 4.0),
        (Precision.INT4, 4.0),
    ],
)
def test_computing_may_be_what_takes_longest(precision: Precision, seconds: float) -> None:
    rates = MachineRates(fp32_flops=10, int8_flops=50, bytes=20)
    assert images_per_second_at_most([STAGE], rates, precision) == 1 / seconds


@pytest.mark.parametrize(
    ("precision", "bytes_read"),
    [(Precision.FP32, 40 * 4 + 8), (Precision.INT8, 40 + 8), (Precision.INT4, 20 + 8)],
)
def test_reading_may_be_what_takes_longest(precision: Precision, bytes_read: float) -> None:
    rates = MachineRates(fp32_flops=1e9, int8_flops=1e9, bytes=2)
    assert images_per_second_at_most([STAGE], rates, precision) == 2 / bytes_read


def test_stages_follow_each_other() -> None:
    rates = MachineRates(fp32_flops=10, int8_flops=50, bytes=20)
    reading = Stage(weight_flops=0, float_flops=0, weights=0, state_bytes=60)
    assert images_per_second_at_most([STAGE, reading], rates, Precision.FP32) == 1 / (12 + 3)
