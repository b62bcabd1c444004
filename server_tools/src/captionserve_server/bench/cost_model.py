"""What captioning an image costs at least, and so how fast a machine could be.

Pure arithmetic on a checkpoint's configuration: multiply-adds (counted as two operations) and bytes
that must be read from memory, for each stage. Only what no implementation can avoid is counted:
matrix products, weights once for each batch, and the keys and values of live captions once a step.
Softmax, norms, activations and the first look at an image file are left out, so the limit is one
that nobody reaches.

Letters: S image tokens, E encoder width, W decoder width, V vocabulary, L decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_FLOAT_BYTES = 4


@dataclass(frozen=True)
class ModelShape:
    """The widths and depths that costs follow from.

    Attributes:
        patches: image patches.
        patch_values: numbers in one patch, all channels.
        image_tokens: S, patches and the tokens added to them.
        encoder_width: E.
        encoder_layers: blocks of the encoder.
        encoder_mlp: width of its feed-forward layers.
        decoder_width: W.
        decoder_layers: L.
        decoder_mlp: width of its feed-forward layers.
        vocabulary: V.
    """

    patches: int
    patch_values: int
    image_tokens: int
    encoder_width: int
    encoder_layers: int
    encoder_mlp: int
    decoder_width: int
    decoder_layers: int
    decoder_mlp: int
    vocabulary: int

    @property
    def projection(self) -> int:
        """Weights of enc_to_dec_proj; 0 where the widths are equal and there is none."""
        same = self.encoder_width == self.decoder_width
        return 0 if same else self.encoder_width * self.decoder_width


def shape_of(config: Any) -> ModelShape:
    """The shape of a transformers VisionEncoderDecoderConfig of ViT or DeiT with GPT-2."""
    encoder, decoder = config.encoder, config.decoder
    height, width = _pair(encoder.image_size)
    patch_height, patch_width = _pair(encoder.patch_size)
    patches = (height // patch_height) * (width // patch_width)
    # A class token, and DeiT's distillation token.
    added = 2 if encoder.model_type == "deit" else 1
    return ModelShape(
        patches=patches,
        patch_values=encoder.num_channels * patch_height * patch_width,
        image_tokens=patches + added,
        encoder_width=encoder.hidden_size,
        encoder_layers=encoder.num_hidden_layers,
        encoder_mlp=encoder.intermediate_size,
        decoder_width=decoder.n_embd,
        decoder_layers=decoder.n_layer,
        decoder_mlp=decoder.n_inner or 4 * decoder.n_embd,
        vocabulary=decoder.vocab_size,
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@dataclass(frozen=True)
class Stage:
    """What one stage costs for one image.

    Attributes:
        name: "encode", "prefill" or "steps".
        weight_flops: operations of products with weights, which quantisation makes cheaper.
        float_flops: operations that stay in float32: attention, and the patches' convolution.
        weights: weights read, which quantisation makes smaller; shared by a batch.
        state_bytes: keys and values written or read, float32.
    """

    name: str
    weight_flops: float
    float_flops: float
    weights: float
    state_bytes: float


@dataclass(frozen=True)
class Load:
    """How many images are done together, and how long their captions are.

    Attributes:
        batch: images at hand at once.
        num_beams: beams of each.
        tokens: tokens generated for each, which is also the decoder's steps.
    """

    batch: int
    num_beams: int
    tokens: float


def stages_of(shape: ModelShape, load: Load) -> list[Stage]:
    """What one image costs in each stage when a batch shares the weights."""
    return [_encode(shape, load), _prefill(shape, load), _steps(shape, load)]


def _encode(shape: ModelShape, load: Load) -> Stage:
    tokens, width = shape.image_tokens, shape.encoder_width
    block = 4 * width * width + 2 * width * shape.encoder_mlp
    embedding = shape.patch_values * width
    return Stage(
        "encode",
        weight_flops=2.0 * shape.encoder_layers * tokens * block,
        float_flops=2.0 * shape.encoder_layers * 2 * tokens * tokens * width
        + 2.0 * shape.patches * embedding,
        weights=(shape.encoder_layers * block + embedding) / load.batch,
        state_bytes=0.0,
    )


def _prefill(shape: ModelShape, load: Load) -> Stage:
    weights = shape.projection + shape.decoder_layers * 2 * shape.decoder_width**2
    return Stage(
        "prefill",
        weight_flops=2.0 * shape.image_tokens * weights,
        float_flops=0.0,
        weights=weights / load.batch,
        state_bytes=_cross_bytes(shape),
    )


def _steps(shape: ModelShape, load: Load) -> Stage:
    """All decoding steps of an image; the first one has a single row, for beams part after it."""
    rows = 1 + (load.tokens - 1) * load.num_beams
    weights = row_weights(shape)
    # A row looks at the start token, at each token since and at the image.
    looked_at = _sum_to(load.tokens, load.num_beams) + rows * shape.image_tokens
    entry_bytes = 2 * shape.decoder_layers * shape.decoder_width * _FLOAT_BYTES
    return Stage(
        "steps",
        weight_flops=2.0 * rows * weights,
        float_flops=2.0 * shape.decoder_layers * 2 * looked_at * shape.decoder_width,
        weights=load.tokens * weights / load.batch,
        state_bytes=load.tokens * _cross_bytes(shape)
        + entry_bytes * _sum_to(load.tokens, load.num_beams),
    )


def row_weights(shape: ModelShape) -> int:
    """Weights that every row of a step meets, the head's included."""
    width = shape.decoder_width
    block = 6 * width * width + 2 * width * shape.decoder_mlp
    return shape.decoder_layers * block + shape.vocabulary * width


def _sum_to(tokens: float, num_beams: int) -> float:
    """Entries looked at over all steps: one at the first, then one more at each for each beam."""
    return 1 + num_beams * (tokens * (tokens + 1) / 2 - 1)


def _cross_bytes(shape: ModelShape) -> float:
    return 2.0 * shape.decoder_layers * shape.image_tokens * shape.decoder_width * _FLOAT_BYTES


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


# Bytes of one weight. What goes with blocks of quantised weights is not counted.
WEIGHT_BYTES = {"fp32": 4.0, "int8": 1.0, "int4": 0.5}


def seconds_at_least(stage: Stage, rates: MachineRates, precision: str) -> float:
    """The shortest time of a stage for one image: computing and reading overlap at best.

    Args:
        stage: its costs.
        rates: the machine.
        precision: a key of WEIGHT_BYTES. int4 weights are multiplied as whichever is faster.
    """
    weight_flops = {
        "fp32": rates.fp32_flops,
        "int8": rates.int8_flops,
        "int4": max(rates.fp32_flops, rates.int8_flops),
    }[precision]
    computing = stage.weight_flops / weight_flops + stage.float_flops / rates.fp32_flops
    reading = (stage.weights * WEIGHT_BYTES[precision] + stage.state_bytes) / rates.bytes
    return max(computing, reading)


def images_per_second_at_most(
    shape: ModelShape, load: Load, rates: MachineRates, precision: str
) -> float:
    """The machine's limit for a load: the stages follow each other, each at its shortest."""
    return 1.0 / sum(seconds_at_least(stage, rates, precision) for stage in stages_of(shape, load))
