"""Small random checkpoints that between them have every shape that export must handle."""

from __future__ import annotations

from dataclasses import dataclass, field

from captionserve_server.export.random_checkpoint import CheckpointShape

GAIN = 10.0


@dataclass(frozen=True)
class RandomCheckpoint:
    """What to make, and how.

    Attributes:
        shape: the model's shapes.
        seed: of its weights; one with which captions differ between images, and many of them end
            before the length limit.
        safetensors: else pytorch_model.bin.
        generation: what its generation_config.json says beside the special tokens.
    """

    shape: CheckpointShape
    seed: int
    safetensors: bool = True
    generation: dict[str, object] = field(default_factory=dict)


RANDOM_CHECKPOINTS = {
    # enc_to_dec_proj, tied head.
    "projected": RandomCheckpoint(
        CheckpointShape(
            image_size=32,
            patch_size=8,
            encoder_width=48,
            encoder_layers=2,
            encoder_heads=4,
            decoder_width=32,
            decoder_layers=3,
            decoder_heads=2,
            vocabulary_size=301,
            max_positions=40,
            gain=GAIN,
        ),
        seed=1,
    ),
    # DeiT with its distillation token, no projection, untied head, weights in pytorch_model.bin;
    # heads wide enough for values in two panels.
    "deit": RandomCheckpoint(
        CheckpointShape(
            encoder="deit",
            image_size=48,
            patch_size=16,
            encoder_width=128,
            encoder_layers=3,
            encoder_heads=4,
            decoder_width=128,
            decoder_layers=2,
            decoder_heads=2,
            vocabulary_size=300,
            max_positions=64,
            tied_head=False,
            gain=GAIN,
        ),
        seed=3,
        safetensors=False,
    ),
    # Two end tokens and defaults of its own.
    "two_ends": RandomCheckpoint(
        CheckpointShape(
            image_size=28,
            patch_size=14,
            encoder_width=40,
            encoder_layers=1,
            encoder_heads=2,
            decoder_width=48,
            decoder_layers=2,
            decoder_heads=4,
            vocabulary_size=520,
            max_positions=32,
            gain=GAIN,
        ),
        seed=275,
        generation={"eos_token_id": [519, 7], "num_beams": 3, "max_length": 12},
    ),
}
