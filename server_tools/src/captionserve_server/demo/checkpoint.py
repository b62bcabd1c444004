"""The demo captioner's parts, as transformers keeps them: tokenizer, image processor and model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2Tokenizer,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from captionserve_server.demo.captions import write_caption
from captionserve_server.demo.scenes import sample_facts

IMAGE_SIZE_PIXELS = 224
_LONGEST_WAVE_PATCHES = 64.0
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class ModelSize:
    """The few numbers that set the captioner's size; both halves share a width, as nlpconnect's."""

    width: int = 192
    heads: int = 6
    encoder_layers: int = 4
    decoder_layers: int = 2
    patch_size_pixels: int = 56
    max_tokens: int = 32
    vocabulary: int = 640

    @property
    def patches_per_side(self) -> int:
        """How many patches the image has along each side."""
        return IMAGE_SIZE_PIXELS // self.patch_size_pixels


def train_tokenizer(vocabulary: int, seed: int) -> GPT2Tokenizer:
    """Learn a byte-level BPE, as GPT-2's, from captions of random facts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_captions(seed, count=20_000), trainer)
    return GPT2Tokenizer(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=ModelSize.max_tokens,
    )


def image_processor() -> ViTImageProcessor:
    """Return the processor of nlpconnect's checkpoint: squash to 224x224, scale to -1..1."""
    return ViTImageProcessor(
        size={"height": IMAGE_SIZE_PIXELS, "width": IMAGE_SIZE_PIXELS},
        resample=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def new_model(size: ModelSize, tokenizer: GPT2Tokenizer) -> VisionEncoderDecoderModel:
    """Return an untrained captioner whose special tokens and generation defaults are set."""
    end = tokenizer.eos_token_id
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        _encoder_config(size), _decoder_config(size, len(tokenizer), end)
    )
    config.decoder_start_token_id = config.pad_token_id = config.eos_token_id = end
    model = VisionEncoderDecoderModel(config)
    _add_position_waves(model, size)
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=end,
        max_length=size.max_tokens,
        num_beams=4,
    )
    return model


def _add_position_waves(model: VisionEncoderDecoderModel, size: ModelSize) -> None:
    """Add sines and cosines of each patch's column and row to the position embeddings.

    As transformers starts them, positions are a faint noise beside what the patches show, and a
    short training ends before the model can tell left from right.
    """
    count = size.width // 4
    waves = 2 * np.pi * _LONGEST_WAVE_PATCHES ** -np.linspace(0.25, 1, count)
    angles = np.arange(size.patches_per_side)[:, None] * waves[None, :]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    across = np.tile(line, (size.patches_per_side, 1))
    down = np.repeat(line, size.patches_per_side, axis=0)
    both = torch.from_numpy(np.concatenate([across, down], axis=1)).float()
    with torch.no_grad():
        model.get_parameter("encoder.embeddings.position_embeddings")[0, 1:] += both


def save_checkpoint(
    output: Path, model: VisionEncoderDecoderModel, tokenizer: GPT2Tokenizer
) -> None:
    """Write every file of a hub checkpoint but its model card.

    The weights are written in fp16 to be small, the configuration asks for fp32 to be exact.
    """
    halved = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(output, state_dict=halved)
    image_processor().save_pretrained(output)
    tokenizer.save_pretrained(output)
    # Readers of GPT-2's older layout look for these; transformers 5 no longer writes them.
    tokenizer.backend_tokenizer.model.save(str(output))
    tokens = json.dumps(tokenizer.special_tokens_map, indent=2) + "\n"
    (output / "special_tokens_map.json").write_text(tokens, encoding="utf-8")


def _captions(seed: int, count: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield write_caption(sample_facts(rng))


def _encoder_config(size: ModelSize) -> ViTConfig:
    return ViTConfig(
        hidden_size=size.width,
        num_hidden_layers=size.encoder_layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        image_size=IMAGE_SIZE_PIXELS,
        patch_size=size.patch_size_pixels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _decoder_config(size: ModelSize, vocabulary: int, end: int) -> GPT2Config:
    # No dropout: training never sees the same picture twice.
    return GPT2Config(
        vocab_size=vocabulary,
        n_positions=size.max_tokens,
        n_embd=size.width,
        n_layer=size.decoder_layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        add_cross_attention=True,
    )
