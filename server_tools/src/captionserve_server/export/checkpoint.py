"""Reading a Hugging Face checkpoint, and refusing by name what cannot be exported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from captionserve_server.core.bundle import Bundle
from captionserve_server.core.captions import SpecialTokens
from captionserve_server.core.confidence import Calibration
from captionserve_server.core.errors import InvalidOptionsError
from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.options import MAX_MAX_LENGTH, DecodingOptions
from captionserve_server.core.preprocessing import PreprocessorConfig, read_preprocessor_config

SUPPORTED_ENCODERS = ("vit", "deit")
SUPPORTED_DECODERS = ("gpt2",)
CALIBRATION_FILE = "confidence.json"
# A model's vocabulary is often filled up to a multiple of one of these, for speed; nothing is
# trained to say what fills it.
_VOCABULARY_MULTIPLES = (8, 16, 32, 64, 128, 256, 512)

# What of generation_config.json has the same name and meaning here.
_GENERATION_DEFAULTS = (
    "num_beams",
    "min_length",
    "length_penalty",
    "num_return_sequences",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "num_beam_groups",
    "diversity_penalty",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "suppress_tokens",
)
# What would change captions and cannot be followed; words are text here.
_UNSUPPORTED_GENERATION = ("bad_words_ids", "force_words_ids", "forced_bos_token_id")


class UnsupportedCheckpointError(ValueError):
    """The checkpoint cannot be exported; the message names what it is and what is supported."""


@dataclass(frozen=True)
class Checkpoint:
    """A captioner ready to be exported.

    Attributes:
        model: the whole model, in float32 and evaluation mode.
        tokenizer: its fast tokenizer.
        preprocessor: its image processor's settings.
        bundle: what serving must know beside the graphs.
        unknown_tokens: tokens of the tokenizer that the model does not know.
    """

    model: VisionEncoderDecoderModel
    tokenizer: PreTrainedTokenizerFast
    preprocessor: PreprocessorConfig
    bundle: Bundle
    unknown_tokens: int

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the encoder takes."""
        return encoder_image_size(self.model.config.encoder)


def load_checkpoint(name: str) -> Checkpoint:
    """Load a checkpoint's weights, tokenizer and settings.

    Args:
        name: a local folder in Hugging Face layout, or a hub id.

    Raises:
        UnsupportedCheckpointError: if its architecture, weights or image processor cannot be
        served, its tokenizer lacks tokens of the model, or its confidence.json cannot be read.
    """
    config = _load_config(name)
    _check_architecture(config)
    preprocessor = _load_preprocessor(name)
    _check_image_size(config, preprocessor)
    calibration = _load_calibration(name)
    model = _load_model(name, config)
    tokenizer = _load_tokenizer(name)
    bundle = _bundle(model, calibration)
    unknown = _unknown_tokens(tokenizer, bundle.geometry.vocabulary_size)
    return Checkpoint(model, tokenizer, preprocessor, bundle, unknown)


def encoder_image_size(encoder: Any) -> tuple[int, int]:
    """(height, width) of a ViT configuration's image_size, a number or a pair."""
    return _pair(encoder.image_size)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _read_json(name: str, filename: str) -> dict[str, Any]:
    """A JSON file of the checkpoint; UnsupportedCheckpointError when it has none."""
    path = _find_file(name, filename)
    if path is None:
        raise UnsupportedCheckpointError(
            f"this is no checkpoint in Hugging Face layout: it has no {filename}"
        )
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def _find_file(name: str, filename: str) -> Path | None:
    folder = Path(name)
    if folder.is_dir():
        path = folder / filename
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, filename))
    except RemoteEntryNotFoundError:
        return None
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise UnsupportedCheckpointError(
            f"{name!r} is neither a local folder nor a hub id that can be reached"
        ) from error


def _find_optional_file(name: str, filename: str) -> Path | None:
    try:
        return _find_file(name, filename)
    except UnsupportedCheckpointError:
        # Without a network, a hub checkpoint in the cache has only what was downloaded.
        return None


def _load_config(name: str) -> Any:
    values = _read_json(name, "config.json")
    model_type = values.get("model_type")
    if model_type != "vision-encoder-decoder":
        raise UnsupportedCheckpointError(
            f"model type {model_type!r} is not supported; supported is 'vision-encoder-decoder'"
        )
    return VisionEncoderDecoderConfig.from_dict(values)


def _check_architecture(config: Any) -> None:
    encoder, decoder = config.encoder.model_type, config.decoder.model_type
    if encoder not in SUPPORTED_ENCODERS or decoder not in SUPPORTED_DECODERS:
        raise UnsupportedCheckpointError(
            f"encoder {encoder!r} with decoder {decoder!r} is not supported; supported are "
            f"encoders {', '.join(SUPPORTED_ENCODERS)} with decoder {', '.join(SUPPORTED_DECODERS)}"
        )
    if not config.decoder.add_cross_attention:
        raise UnsupportedCheckpointError("the decoder has no cross-attention to look at the image")
    if config.encoder.num_channels != 3:
        raise UnsupportedCheckpointError(
            f"the encoder takes {config.encoder.num_channels} channels; supported are 3 (RGB)"
        )


def _load_preprocessor(name: str) -> PreprocessorConfig:
    try:
        return read_preprocessor_config(_read_json(name, "preprocessor_config.json"))
    except ValueError as error:
        raise UnsupportedCheckpointError(str(error)) from error


def _check_image_size(config: Any, preprocessor: PreprocessorConfig) -> None:
    wanted, given = encoder_image_size(config.encoder), preprocessor.output_size()
    if wanted != given:
        raise UnsupportedCheckpointError(
            f"the image processor makes images of {given}, the encoder takes {wanted}"
        )


def _load_calibration(name: str) -> Calibration:
    """The checkpoint's own calibration, or the default where it has none."""
    path = _find_optional_file(name, CALIBRATION_FILE)
    if path is None:
        return Calibration()
    try:
        return Calibration.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedCheckpointError(f"its {CALIBRATION_FILE}: {error}") from error


def _load_model(name: str, config: Any) -> VisionEncoderDecoderModel:
    loaded: Any = VisionEncoderDecoderModel.from_pretrained(
        name,
        config=config,
        dtype=torch.float32,
        weights_only=True,
        output_loading_info=True,
        # Others export a search for NaN in every score.
        attn_implementation="eager",
    )
    model, report = loaded
    missing = sorted(key for key in report["missing_keys"] if ".pooler." not in key)
    if missing or report["mismatched_keys"]:
        raise UnsupportedCheckpointError(
            "the weights are incomplete: "
            + ", ".join([*missing, *map(str, report["mismatched_keys"])][:5])
        )
    ready: VisionEncoderDecoderModel = model.eval()
    return ready


def _load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedCheckpointError("the checkpoint has no tokenizer.json or GPT-2 vocabulary")
    return tokenizer


def _unknown_tokens(tokenizer: PreTrainedTokenizerFast, vocabulary_size: int) -> int:
    """How many of the tokenizer's tokens the model does not know.

    Raises:
        UnsupportedCheckpointError: if it lacks tokens that the model may say: their text is lost.
    """
    ids = set(tokenizer.get_vocab().values())
    known = sum(token < vocabulary_size for token in ids)
    filled_up = any(-known % each + known == vocabulary_size for each in _VOCABULARY_MULTIPLES)
    if known < vocabulary_size and not (known and filled_up):
        raise UnsupportedCheckpointError(
            f"its tokenizer has {known} tokens of the model's {vocabulary_size}: "
            "it is not this model's"
        )
    return len(ids) - known


def _bundle(model: VisionEncoderDecoderModel, calibration: Calibration) -> Bundle:
    encoder: Any = model.config.encoder
    decoder: Any = model.config.decoder
    generation: Any = model.generation_config
    height, width = encoder_image_size(encoder)
    patch_height, patch_width = _pair(encoder.patch_size)
    return Bundle(
        geometry=DecoderGeometry(
            layers=decoder.n_layer,
            heads=decoder.n_head,
            head_dim=decoder.n_embd // decoder.n_head,
            image_tokens=_image_tokens(model.encoder, height, width),
            grid_rows=height // patch_height,
            grid_cols=width // patch_width,
            encoder_width=encoder.hidden_size,
            vocabulary_size=decoder.vocab_size,
            max_positions=decoder.n_positions,
        ),
        special=_special_tokens(generation),
        defaults=_default_options(generation, decoder.n_positions),
        calibration=calibration,
    )


def _image_tokens(encoder: nn.Module, height: int, width: int) -> int:
    with torch.no_grad():
        states = encoder(torch.zeros(1, 3, height, width)).last_hidden_state
    return int(states.shape[1])


def _special_tokens(generation: GenerationConfig) -> SpecialTokens:
    start = generation.decoder_start_token_id
    start = generation.bos_token_id if start is None else start
    end = generation.eos_token_id
    if start is None or end is None:
        raise UnsupportedCheckpointError(
            "the checkpoint names no decoder_start_token_id (or bos_token_id) or no eos_token_id"
        )
    return SpecialTokens(start=int(start), end=tuple(end) if isinstance(end, list) else (int(end),))


def _default_options(generation: GenerationConfig, max_positions: int) -> DecodingOptions:
    """The checkpoint's own generation defaults, where it has them.

    Sampling is not among them, only how it is done: whoever wants captions that differ each time
    must say so.
    """
    given: dict[str, Any] = {
        name: getattr(generation, name)
        for name in _GENERATION_DEFAULTS
        if getattr(generation, name, None) is not None
    }
    for name in _UNSUPPORTED_GENERATION:
        if getattr(generation, name, None) is not None:
            raise UnsupportedCheckpointError(f"its generation defaults have {name}")
    early_stopping = getattr(generation, "early_stopping", None)
    if early_stopping is not None:
        given["early_stopping"] = early_stopping
    length = generation.max_length or DecodingOptions.max_length
    if generation.max_new_tokens is not None:
        length = generation.max_new_tokens + 1
    given["max_length"] = min(length, max_positions, MAX_MAX_LENGTH)
    try:
        return DecodingOptions.from_given(given)
    except InvalidOptionsError as error:
        raise UnsupportedCheckpointError(f"its generation defaults: {error.message}") from error
