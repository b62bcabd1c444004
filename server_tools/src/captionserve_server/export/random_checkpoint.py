"""Random-weight checkpoints: of nlpconnect's exact shapes for speed, and small odd ones for tests.

Speed does not depend on the weights, so a full-size random model measures as the real one would.
For tests of decoding the weights are scaled up: a freshly initialised GPT-2 says nearly the same
of every token, and exactness would hang on rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    DeiTConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

_END_OF_TEXT = "<|endoftext|>"
_ENDING_POSITIONS = slice(5, 12)
_ENDING_STRENGTH = 1.5


@dataclass(frozen=True)
class CheckpointShape:
    """Shapes of a random checkpoint; by default nlpconnect/vit-gpt2-image-captioning's.

    Attributes:
        encoder: "vit" or "deit".
        image_size: height and width in pixels.
        patch_size: height and width of a patch in pixels.
        encoder_width: width of the encoder.
        encoder_layers: blocks of the encoder.
        encoder_heads: heads of the encoder.
        decoder_width: width of the decoder; enc_to_dec_proj appears where it differs.
        decoder_layers: blocks of the decoder.
        decoder_heads: heads of the decoder.
        vocabulary_size: tokens; the last one starts, ends and pads.
        max_positions: longest sequence of the decoder.
        tied_head: whether the head is the token embedding.
        gain: factor on the decoder's weights; above 1 for peaked distributions that follow the
        image.
    """

    encoder: str = "vit"
    image_size: int = 224
    patch_size: int = 16
    encoder_width: int = 768
    encoder_layers: int = 12
    encoder_heads: int = 12
    decoder_width: int = 768
    decoder_layers: int = 12
    decoder_heads: int = 12
    vocabulary_size: int = 50257
    max_positions: int = 1024
    tied_head: bool = True
    gain: float = 1.0


def make_checkpoint(
    folder: Path, shape: CheckpointShape, *, seed: int = 0, safetensors: bool = True
) -> None:
    """Write a random checkpoint in the layout of a hub checkpoint.

    Args:
        folder: where to write.
        shape: what to write.
        seed: of the weights.
        safetensors: whether the weights go to model.safetensors; else to pytorch_model.bin.
    """
    torch.manual_seed(seed)
    model = VisionEncoderDecoderModel(_config(shape))
    _scale_decoder(model, shape.gain)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    if not safetensors:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    _write_tokenizer(folder, shape.vocabulary_size)
    _write_preprocessor(folder, shape)


def _config(shape: CheckpointShape) -> Any:
    end = shape.vocabulary_size - 1
    encoder_type = DeiTConfig if shape.encoder == "deit" else ViTConfig
    encoder = encoder_type(
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_size=shape.encoder_width,
        num_hidden_layers=shape.encoder_layers,
        num_attention_heads=shape.encoder_heads,
        intermediate_size=4 * shape.encoder_width,
    )
    decoder = GPT2Config(
        vocab_size=shape.vocabulary_size,
        n_positions=shape.max_positions,
        n_embd=shape.decoder_width,
        n_layer=shape.decoder_layers,
        n_head=shape.decoder_heads,
        bos_token_id=end,
        eos_token_id=end,
        add_cross_attention=True,
        tie_word_embeddings=shape.tied_head,
    )
    config: Any = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=end, eos_token_id=end, pad_token_id=end
    )
    return config


def _scale_decoder(model: VisionEncoderDecoderModel, gain: float) -> None:
    """Let blocks and positions outweigh the token that came in, and sharpen the distribution.

    The token embeddings stay small: a tied head would repeat the newest token for ever otherwise.
    """
    if gain == 1.0:
        return
    decoder: Any = model.decoder.transformer
    embeddings: Any = model.encoder.embeddings
    with torch.no_grad():
        for parameter in [*decoder.h.parameters(), decoder.wpe.weight]:
            if parameter.dim() > 1:
                parameter.mul_(gain)
        decoder.ln_f.weight.mul_(gain)
        # The end token looks like the later positions, so that captions end at lengths of their
        # own.
        head: Any = model.decoder.lm_head.weight
        later = functional.normalize(decoder.wpe.weight[_ENDING_POSITIONS].mean(dim=0), dim=0)
        head[-1] = _ENDING_STRENGTH * head.norm(dim=1).mean() * later
        # A fresh encoder gives nearly the same states for every image; spread them.
        for parameter in embeddings.patch_embeddings.parameters():
            parameter.mul_(gain)


def _write_tokenizer(folder: Path, vocabulary_size: int) -> None:
    """A byte-level tokenizer of the right size; words beyond the bytes are made up."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = tokens[: vocabulary_size - 1]
    tokens += [f"\u0120word{number}" for number in range(vocabulary_size - 1 - len(tokens))]
    vocabulary = {token: number for number, token in enumerate([*tokens, _END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_END_OF_TEXT,
        eos_token=_END_OF_TEXT,
        unk_token=_END_OF_TEXT,
        pad_token=_END_OF_TEXT,
    ).save_pretrained(folder)


def _write_preprocessor(folder: Path, shape: CheckpointShape) -> None:
    size = {"height": shape.image_size, "width": shape.image_size}
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "size": size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
