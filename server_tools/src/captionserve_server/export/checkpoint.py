"""Reading a Hugging Face checkpoint, and refusing by name what cannot be exported."""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from captionserve_server.core.bundle import Bundle
from captionserve_server.core.confidence import Calibration
from captionserve_server.core.geometry import DecoderGeometry
from captionserve_server.core.preprocessing import PreprocessorConfig, read_preprocessor_config
from captionserve_server.export.errors import UnsupportedCheckpointError
from captionserve_server.export.generation import (
    GENERATION_FILE,
    Generation,
    UnsupportedSettingError,
    read_generation,
)
from captionserve_server.export.image_size import (
    check_image_size,
    interpolate_positions,
    preprocessor_of_size,
)
from captionserve_server.runtime.any_path import utf8_path

SUPPORTED_ENCODERS = ("vit", "deit")
SUPPORTED_DECODERS = ("gpt2",)
CALIBRATION_FILE = "confidence.json"
# A model's vocabulary is often filled up to a multiple of one of these, for speed; nothing is
# trained to say what fills it.
_VOCABULARY_MULTIPLES = (8, 16, 32, 64, 128, 256, 512)

PREPROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_LFS_POINTER = b"version https://git-lfs"


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


def load_checkpoint(name: str, image_size: int | None = None) -> Checkpoint:
    """Load a checkpoint's weights, tokenizer and settings.

    Args:
        name: a local folder in Hugging Face layout, or a hub id.
        image_size: rows and columns of the images that it shall read; None for its own.

    Raises:
        UnsupportedImageSizeError: if it cannot read images of that size.
        UnsupportedCheckpointError: if its architecture, weights or image processor cannot be
        served, its tokenizer lacks tokens of the model, or its confidence.json cannot be read.
    """
    folder = Path(name)
    if not folder.is_dir():
        return _load(name, image_size)
    with utf8_path(folder) as readable:
        _check_files(readable)
        return _load(str(readable), image_size)


def _load(name: str, image_size: int | None) -> Checkpoint:
    """Small files first: what is wrong shows before the weights are read."""
    with _reading("config.json"):
        config = _load_config(name)
        _check_architecture(config)
    _check_completeness(name)
    with _reading("image processor's settings"):
        preprocessor = _load_preprocessor(name)
        _check_image_size(config, preprocessor)
    if image_size is not None:
        check_image_size(config.encoder, image_size)
        preprocessor = preprocessor_of_size(preprocessor, image_size)
    calibration = _load_calibration(name, config.encoder.hidden_size)
    weights = next((each for each in WEIGHTS_FILES if _find_optional_file(name, each)), "weights")
    with _reading(f"{weights}, or its config.json or {GENERATION_FILE},"):
        model = _load_model(name, config)
    if image_size is not None:
        interpolate_positions(model, image_size)
    with _reading("tokenizer.json"):
        tokenizer = _load_tokenizer(name)
    with _reading(GENERATION_FILE):
        generation = _load_generation(model)
    with _reading("config.json"):
        bundle = _bundle(model, calibration, generation)
    unknown = _unknown_tokens(tokenizer, bundle.geometry.vocabulary_size)
    return Checkpoint(model, tokenizer, preprocessor, bundle, unknown)


@contextmanager
def _reading(filename: str) -> Iterator[None]:
    """Let whatever goes wrong name the file, since libraries raise anything on a damaged one."""
    try:
        yield
    except (UnsupportedCheckpointError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedCheckpointError(f"its {filename} is damaged or not supported") from error


def _check_files(folder: Path) -> None:
    """Refuse files of a local folder that are not what they seem; the hub's are as uploaded."""
    name = str(folder)
    _read_json(name, "config.json")
    if (folder / "adapter_config.json").exists():
        raise UnsupportedCheckpointError(
            "its adapter_config.json names an adapter, which must be merged into the weights first"
        )
    for path in sorted(folder.glob("*")):
        if path.is_file() and _is_lfs_pointer(path):
            raise UnsupportedCheckpointError(
                f"its {path.name} is a Git LFS pointer and not the file itself; run git lfs pull"
            )
    for optional in (GENERATION_FILE, *PREPROCESSOR_FILES, "tokenizer_config.json"):
        if (folder / optional).is_file():
            _read_json(name, optional)


def _check_completeness(name: str) -> None:
    """Refuse a local folder without weights or tokenizer; of a hub's, loading says so."""
    folder = Path(name)
    for wanted in (WEIGHTS_FILES, TOKENIZER_FILES):
        if folder.is_dir() and not any((folder / each).is_file() for each in wanted):
            raise UnsupportedCheckpointError(f"it has no {wanted[0]} and no {wanted[-1]}")


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise UnsupportedCheckpointError(f"its {path.name} cannot be read") from error


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
            f"this is no checkpoint in Hugging Face layout: it has no {filename}; a folder with "
            "config.json, weights and tokenizer is wanted, such as demo/checkpoint"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    # ValueError: bad UTF-8 or JSON. RecursionError: lists within lists.
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedCheckpointError(f"its {filename} is no JSON in UTF-8") from error
    if not isinstance(values, dict):
        raise UnsupportedCheckpointError(f"its {filename} is no JSON object")
    return values


def _find_file(name: str, filename: str) -> Path | None:
    folder = Path(name)
    if folder.is_dir():
        path = folder / filename
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, filename, local_files_only=not _hub_is_known()))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        raise UnsupportedCheckpointError(
            f"{name!r} is no local folder, and the Hugging Face hub cannot be reached: copy its "
            "files to this machine and give their folder, or try demo/checkpoint"
        ) from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise UnsupportedCheckpointError(
            f"{name!r} is neither a local folder nor a hub id that everybody may read: give a "
            "checkpoint's folder, or an id such as nlpconnect/vit-gpt2-image-captioning"
        ) from error


@functools.cache
def _hub_is_known() -> bool:
    """Whether the hub's name leads anywhere; where it does not, asking it takes half a minute."""
    if getproxies().keys() & {"all", "http", "https"}:  # Then the proxy knows.
        return True
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


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
    filename, settings = PREPROCESSOR_FILES[-1], None
    nested = PREPROCESSOR_FILES[0]
    # As in transformers 5, what a whole processor says comes first.
    if _find_optional_file(name, nested) is not None:
        settings = _read_json(name, nested).get("image_processor")
    if settings is None:
        settings = _read_json(name, filename)
    else:
        filename = nested
    try:
        return read_preprocessor_config(settings)
    except ValueError as error:
        raise UnsupportedCheckpointError(f"its {filename}: {error}") from error


def _check_image_size(config: Any, preprocessor: PreprocessorConfig) -> None:
    wanted, given = encoder_image_size(config.encoder), preprocessor.output_size()
    if wanted != given:
        raise UnsupportedCheckpointError(
            f"the image processor makes images of {given}, the encoder takes {wanted}"
        )


def _load_calibration(name: str, encoder_width: int) -> Calibration:
    """The checkpoint's own calibration, or the default where it has none."""
    path = _find_optional_file(name, CALIBRATION_FILE)
    if path is None:
        return Calibration()
    try:
        calibration = Calibration.from_json(path.read_text(encoding="utf-8"))
        if len(calibration.image) not in (0, encoder_width):
            raise ValueError(f"image must have a number for each of {encoder_width} in a state")
    except ValueError as error:
        raise UnsupportedCheckpointError(f"its {CALIBRATION_FILE}: {error}") from error
    return calibration


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


def _load_generation(model: VisionEncoderDecoderModel) -> Generation:
    """What generate() would follow: generation_config.json, or the decoder's config without one."""
    decoder: Any = model.config.decoder
    settings: Any = model.generation_config
    own = {name: value for name, value in vars(settings).items() if not name.startswith("_")}
    try:
        return read_generation(own, decoder.vocab_size, decoder.n_positions)
    except UnsupportedSettingError as error:
        raise UnsupportedCheckpointError(f"its {GENERATION_FILE}: {error}") from error


def _bundle(
    model: VisionEncoderDecoderModel, calibration: Calibration, generation: Generation
) -> Bundle:
    encoder: Any = model.config.encoder
    decoder: Any = model.config.decoder
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
        special=generation.special,
        defaults=generation.defaults,
        calibration=calibration,
        rules=generation.rules,
    )


def _image_tokens(encoder: nn.Module, height: int, width: int) -> int:
    with torch.no_grad():
        states = encoder(torch.zeros(1, 3, height, width)).last_hidden_state
    return int(states.shape[1])
