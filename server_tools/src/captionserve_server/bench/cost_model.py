"""What captioning an image costs at least, and so how fast a machine could be.

Pure arithmetic on a checkpoint's configuration: multiply-adds (counted as two operations) and bytes
that must be read from memory, for each stage. Only what no implementation can avoid is counted:
matrix products, weights once for each batch, and the keys and values of live captions once a step.
Softmax, norms, activations and the first look at an image file are left out, so the limit is one
that nobody reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from captionserve_server.export.precision import Precision

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class MachineRates:
    """What a machine was seen to do.

    Attributes:
        fp32_flops: operations a second of a large float32 matrix product.
        int8_flops: operations a second of one whose weights are int8.
        bytes: bytes a second read from memory.
    """

    fp32_flops: float
    int8_flops: float
    bytes: float


@dataclass(frozen=True)
class Stage:
    """What one stage costs for one image.

    Attributes:
        weight_flops: operations of products with weights, which quantisation makes cheaper.
        float_flops: operations that stay in float32: attention, and the patches' convolution.
        weights: weights read, which quantisation makes smaller; shared by a batch.
        state_bytes: keys and values written or read, float32.
    """

    weight_flops: float
    float_flops: float
    weights: float
    state_bytes: float


def images_per_second_at_most(
    stages: Sequence[Stage], rates: MachineRates, precision: Precision
) -> float:
    """The machine's limit: stages follow each other; in each, computing and reading overlap."""
    weight_flops, weight_bytes = {
        Precision.FP32: (rates.fp32_flops, 4.0),
        Precision.INT8: (rates.int8_flops, 1.0),
        # Its weights are multiplied as whichever is faster. What goes with blocks is not counted.
        Precision.INT4: (max(rates.fp32_flops, rates.int8_flops), 0.5),
    }[precision]
    seconds = 0.0
    for stage in stages:
        computing = stage.weight_flops / weight_flops + stage.float_flops / rates.fp32_flops
        reading = (stage.weights * weight_bytes + stage.state_bytes) / rates.bytes
        seconds += max(computing, reading)
    return 1.0 / seconds


def stages_of(config: Any, batch: int, num_beams: int, tokens: float) -> tuple[Stage, Stage, Stage]:
    """What one image costs to encode, to prefill and to decode, when a batch shares the weights.

    Args:
        config: transformers' VisionEncoderDecoderConfig of ViT or DeiT with GPT-2.
        batch: images at hand at once.
        num_beams: beams of each.
        tokens: tokens generated for each, which is also the decoder's steps.
    """
    encoder, decoder = config.encoder, config.decoder
    patch_sides = np.broadcast_to(encoder.patch_size, 2)
    patches = int(np.prod(np.broadcast_to(encoder.image_size, 2) // patch_sides))
    # A class token, and DeiT's distillation token.
    image_tokens = patches + (2 if encoder.model_type == "deit" else 1)

    wide, blocks = encoder.hidden_size, encoder.num_hidden_layers
    embedding = encoder.num_channels * int(np.prod(patch_sides)) * wide
    encoder_weights = blocks * (4 * wide**2 + 2 * wide * encoder.intermediate_size)
    encode = Stage(
        weight_flops=2.0 * image_tokens * encoder_weights,
        float_flops=2.0 * (blocks * 2 * image_tokens**2 * wide + patches * embedding),
        weights=(encoder_weights + embedding) / batch,
        state_bytes=0.0,
    )

    width, layers = decoder.n_embd, decoder.n_layer
    # enc_to_dec_proj is there only where the widths differ.
    projection = 0 if wide == width else wide * width
    cross_weights = projection + layers * 2 * width**2
    entry_bytes = 2 * layers * width * _FLOAT_BYTES
    prefill = Stage(
        weight_flops=2.0 * image_tokens * cross_weights,
        float_flops=0.0,
        weights=cross_weights / batch,
        state_bytes=float(image_tokens * entry_bytes),
    )

    mlp = decoder.n_inner or 4 * width
    row_weights = layers * (6 * width**2 + 2 * width * mlp) + decoder.vocab_size * width
    # Beams part after the first step, which has a single row that looks at the start token only;
    # at each step since, every beam looks at one token more. All look at the image besides.
    rows = 1 + (tokens - 1) * num_beams
    entries = 1 + num_beams * (tokens * (tokens + 1) / 2 - 1)
    steps = Stage(
        weight_flops=2.0 * rows * row_weights,
        float_flops=2.0 * layers * 2 * (entries + rows * image_tokens) * width,
        weights=tokens * row_weights / batch,
        state_bytes=entry_bytes * (tokens * image_tokens + entries),
    )
    return encode, prefill, steps
