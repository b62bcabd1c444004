"""Putting a checked export together as a complete Triton model repository."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from captionserve_server.core import bundle as files
from captionserve_server.core import tensors
from captionserve_server.export.checkpoint import Checkpoint, load_checkpoint
from captionserve_server.export.onnx_export import (
    export_encoder,
    export_prefill,
    export_step,
    export_top,
)
from captionserve_server.export.precision import Precision
from captionserve_server.export.quantise import quantise_decoder, quantise_encoder
from captionserve_server.export.verify import Verification, verify_export

Progress = Callable[[str], None]
"""Called with what begins now."""

Comparison = Callable[[Path, Path], dict[str, float]]
"""Given the fp32 and the quantised model repository before the latter is published, without their
configurations: figures by name of how well their captions agree."""

_GRAPHS = (
    (export_encoder, tensors.VISION_ENCODER, files.ENCODER_GRAPH_FILE),
    (export_prefill, tensors.DECODER_STEP, files.PREFILL_GRAPH_FILE),
    (export_step, tensors.DECODER_STEP, files.STEP_GRAPH_FILE),
    (export_top, tensors.DECODER_STEP, files.TOP_GRAPH_FILE),
)
_QUANTISERS = {
    files.ENCODER_GRAPH_FILE: quantise_encoder,
    files.PREFILL_GRAPH_FILE: quantise_decoder,
    files.STEP_GRAPH_FILE: quantise_decoder,
}

# The static configuration warms the reference checkpoint's 224 x 224 up; see vision_encoder.
_WARMUP_DIMS = re.compile(r"dims: \[ ?3, 224, 224 ?\]")


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        repository: the model repository.
        version: the version folder written in each model.
        precision: of the graphs.
        bytes_on_disk: size of that version over all models.
        verification: how far the graphs are from PyTorch.
        agreement: what was compared with fp32; empty in fp32.
    """

    repository: Path
    version: int
    precision: Precision
    bytes_on_disk: int
    verification: Verification
    agreement: dict[str, float]

    def as_json(self) -> dict[str, object]:
        """The report as JSON values."""
        return {**dataclasses.asdict(self), "repository": str(self.repository)}


def export_checkpoint(
    checkpoint_name: str,
    output: Path,
    *,
    version: int = 1,
    precision: Precision = Precision.FP32,
    compare: Comparison = lambda fp32, quantised: {},
    progress: Progress = lambda _: None,
) -> ExportReport:
    """Export a checkpoint into a Triton model repository and check it against PyTorch.

    Nothing appears in `output` before every graph has been checked. Versions that are there already
    stay, so that a repository can hold several side by side.

    Args:
        checkpoint_name: a local folder in Hugging Face layout, or a hub id.
        output: the model repository to write or to add to.
        version: the version number in every model.
        precision: of the graphs.
        compare: asked how well the captions agree with fp32, unless the precision is fp32.
        progress: told what begins.

    Raises:
        UnsupportedCheckpointError: if the checkpoint cannot be exported.
        GraphMismatchError: if a graph differs from PyTorch.
        FileExistsError: if the version is there already.
    """
    if (output / tensors.CAPTIONER.name / str(version)).exists():
        raise FileExistsError(f"version {version} is in the model repository already")
    progress("loading the checkpoint")
    checkpoint = load_checkpoint(checkpoint_name)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".export-") as folder:
        staging = Path(folder) / Precision.FP32.value
        _export_graphs(checkpoint, staging, version, progress)
        _write_settings(checkpoint, staging, version)
        agreement: dict[str, float] = {}
        if precision is not Precision.FP32:
            fp32, staging = staging, Path(folder) / precision.value
            _quantise(fp32, staging, version, precision, progress)
            progress("comparing the captions with those of fp32")
            agreement = compare(fp32, staging)
        progress("comparing the graphs with PyTorch")
        verification = verify_export(checkpoint, _graphs(staging, version), precision)
        written = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        _publish(checkpoint, staging, output, version)
    return ExportReport(output, version, precision, written, verification, agreement)


def static_repository() -> Path:
    """The models' configuration and code, as they are kept in the package."""
    return Path(str(resources.files("captionserve_server") / "model_repository"))


def _graphs(repository: Path, version: int) -> dict[str, Path]:
    """The path of each graph by its file name."""
    return {
        filename: _version_folder(repository, model, version) / filename
        for _, model, filename in _GRAPHS
    }


def _export_graphs(checkpoint: Checkpoint, staging: Path, version: int, progress: Progress) -> None:
    graphs = _graphs(staging, version)
    for export, model, filename in _GRAPHS:
        progress(f"exporting {filename} of {model.name}")
        export(checkpoint, graphs[filename])


def _quantise(
    fp32: Path, target: Path, version: int, precision: Precision, progress: Progress
) -> None:
    """Copy a staged repository with its graphs in another precision."""
    progress(f"quantising the graphs to {precision.value}")
    shutil.copytree(fp32, target, ignore=shutil.ignore_patterns(*_QUANTISERS))
    sources, graphs = _graphs(fp32, version), _graphs(target, version)
    for filename, quantise in _QUANTISERS.items():
        quantise(sources[filename], graphs[filename], precision)


def _write_settings(checkpoint: Checkpoint, staging: Path, version: int) -> None:
    for model in (tensors.CAPTIONER, tensors.CAPTIONER_STREAM):
        folder = _version_folder(staging, model, version)
        (folder / files.BUNDLE_FILE).write_text(checkpoint.bundle.to_json())
        checkpoint.tokenizer.backend_tokenizer.save(
            str(folder / files.TOKENIZER_FILE), pretty=False
        )
    decoder = _version_folder(staging, tensors.DECODER_STEP, version)
    (decoder / files.BUNDLE_FILE).write_text(checkpoint.bundle.to_json())
    preprocess = _version_folder(staging, tensors.PREPROCESS, version)
    settings = json.dumps(dataclasses.asdict(checkpoint.preprocessor), indent=2)
    (preprocess / files.PREPROCESSOR_FILE).write_text(settings + "\n")


def _version_folder(repository: Path, model: tensors.ModelSpec, version: int) -> Path:
    folder = repository / model.name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _publish(checkpoint: Checkpoint, staging: Path, output: Path, version: int) -> None:
    static = static_repository()
    for model in tensors.MODELS:
        source, target = staging / model.name / str(version), output / model.name
        code = static / model.name / "1" / "model.py"
        if code.exists():
            shutil.copyfile(code, source / code.name)
        target.mkdir(exist_ok=True)
        source.rename(target / str(version))
        config = (static / model.name / "config.pbtxt").read_text()
        (target / "config.pbtxt").write_text(_with_image_size(config, checkpoint.image_size))


def _with_image_size(config: str, size: tuple[int, int]) -> str:
    """A model's configuration, its warm-up made for images of `size` (height, width)."""
    return _WARMUP_DIMS.sub(f"dims: [3, {size[0]}, {size[1]}]", config)
