"""Where everything lies in a model repository: folders of models, files of their versions.

    decoder/            bundle.json, tokenizer.json, preprocessor.json, prefill, step and top graphs
    vision_encoder/     the encoder's graph
    captioner/          a front for KServe callers, without files of its own
    captioner_stream/   likewise, decoupled

Each has a config.pbtxt and a folder for every version. `export` writes it; Triton and the edge mode
read it.
"""

from __future__ import annotations

from pathlib import Path

from captionserve_server.core.bundle import Bundle
from captionserve_server.core.errors import InvalidOptionsError

DECODER = "decoder"
VISION_ENCODER = "vision_encoder"
CAPTIONER = "captioner"
CAPTIONER_STREAM = "captioner_stream"
MODELS = (DECODER, VISION_ENCODER, CAPTIONER, CAPTIONER_STREAM)

BUNDLE_FILE = "bundle.json"
TOKENIZER_FILE = "tokenizer.json"
PREPROCESSOR_FILE = "preprocessor.json"
# The graphs' files in ONNX; GraphFormat.file says what they are called in another format.
ENCODER_GRAPH_FILE = "model.onnx"
PREFILL_GRAPH_FILE = "prefill.onnx"
STEP_GRAPH_FILE = "step.onnx"
TOP_GRAPH_FILE = "top.onnx"

# Models that exports before the decoder had everything in one process wrote.
_MODELS_OF_OLDER_EXPORTS = ("decoder_step", "preprocess")


def versions_of(repository: Path) -> list[int]:
    """The versions of the decoder in a model repository, the oldest first."""
    folder = repository / DECODER
    return sorted(int(each.name) for each in folder.iterdir() if each.name.isdecimal())


def what_is_missing(folder: Path) -> str:
    """Why a folder is no model repository that can be served, and what to do; "" when it is one."""
    older = [name for name in _MODELS_OF_OLDER_EXPORTS if (folder / name).is_dir()]
    if older:
        return (
            f"this model repository was written by an older export (it holds "
            f"{' and '.join(older)}): export the checkpoint again, into a new folder"
        )
    missing = [name for name in MODELS if not (folder / name / "config.pbtxt").is_file()]
    if missing and (folder / "config.json").is_file():
        return (
            "this is a checkpoint: `captionserve export CHECKPOINT --output DIR` makes a model "
            "repository of it, and that is wanted"
        )
    if missing:
        return (
            f"this is no model repository (it lacks {', '.join(missing)}): "
            "a folder that `captionserve export` wrote is wanted"
        )
    for version in versions_of(folder):
        bundle = folder / DECODER / str(version) / BUNDLE_FILE
        try:
            Bundle.from_json(bundle.read_text())
        except (OSError, LookupError, ValueError, TypeError, InvalidOptionsError):
            return (
                f"version {version} of this model repository was written by an older export, or is "
                f"damaged ({BUNDLE_FILE} cannot be read): export the checkpoint again"
            )
    return ""
