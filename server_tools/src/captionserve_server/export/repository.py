"""Putting a checked export together as a complete Triton model repository."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Protocol

from captionserve_server.export import onnx_export, torchscript_export
from captionserve_server.export.checkpoint import Checkpoint, load_checkpoint
from captionserve_server.export.precision import Precision
from captionserve_server.export.quantise import quantise_encoder, quantise_prefill, quantise_step
from captionserve_server.export.verify import Verification, verify_export
from captionserve_server.runtime import model_repository as files
from captionserve_server.runtime.any_path import utf8_path
from captionserve_server.runtime.graph_format import GraphFormat

Progress = Callable[[str], None]
"""Called with what begins now."""

Comparison = Callable[[Path, Path], Mapping[str, float]]
"""Given the fp32 and the quantised model repository before the latter is published, without their
configurations: figures by name of how well their captions agree."""


class Exporter(Protocol):
    """What writes a checkpoint's graphs in one format; a module is one."""

    def export_encoder(self, checkpoint: Checkpoint, path: Path, /) -> None:
        """Write the encoder graph."""

    def export_prefill(self, checkpoint: Checkpoint, path: Path, /) -> None:
        """Write the prefill graph."""

    def export_step(self, checkpoint: Checkpoint, path: Path, /) -> None:
        """Write the step graph."""

    def export_top(self, checkpoint: Checkpoint, path: Path, /) -> None:
        """Write the graph that finds the best tokens."""


_EXPORTERS: dict[GraphFormat, Exporter] = {
    GraphFormat.ONNX: onnx_export,
    GraphFormat.TORCHSCRIPT: torchscript_export,
}


_QUANTISERS = {
    files.ENCODER_GRAPH_FILE: quantise_encoder,
    files.PREFILL_GRAPH_FILE: quantise_prefill,
    files.STEP_GRAPH_FILE: quantise_step,
}


class UnsupportedFormatError(ValueError):
    """The graphs cannot be written in the format and precision asked for."""


class OtherFormatError(ValueError):
    """The model repository holds versions in another format than the one to be added."""


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        repository: the model repository.
        version: the version folder written in each model.
        graph_format: what the graphs are written as.
        precision: of the graphs.
        image_size: (height, width) of the images that the model reads.
        bytes_on_disk: size of that version over all models.
        verification: how far the graphs are from PyTorch.
        agreement: what was compared with fp32; empty in fp32.
        unknown_tokens: tokens of the tokenizer that the model does not know; options whose text
            has them are refused.
    """

    repository: Path
    version: int
    graph_format: GraphFormat
    precision: Precision
    image_size: tuple[int, int]
    bytes_on_disk: int
    verification: Verification
    agreement: Mapping[str, float]
    unknown_tokens: int

    def as_json(self) -> dict[str, object]:
        """The report as JSON values."""
        return {**dataclasses.asdict(self), "repository": str(self.repository)}


def export_checkpoint(
    checkpoint_name: str,
    output: Path,
    *,
    version: int = 1,
    graph_format: GraphFormat = GraphFormat.ONNX,
    precision: Precision = Precision.FP32,
    image_size: int | None = None,
    compare: Comparison = lambda fp32, quantised: {},
    progress: Progress = lambda _: None,
) -> ExportReport:
    """Export a checkpoint into a Triton model repository and check it against PyTorch.

    `output` gets all of it once every graph has been checked, or nothing and is not even made.
    Versions that are there already stay, so that a repository can hold several side by side.

    Args:
        checkpoint_name: a local folder in Hugging Face layout, or a hub id.
        output: the model repository to write or to add to.
        version: the version number in every model.
        graph_format: what the graphs are written as.
        precision: of the graphs.
        image_size: rows and columns of the images that the model shall read, for which its position
            embeddings are interpolated; None for the checkpoint's own.
        compare: asked how well the captions agree with fp32, unless the precision is fp32.
        progress: told what begins.

    Raises:
        UnsupportedCheckpointError: if the checkpoint cannot be exported.
        UnsupportedFormatError: if the format has no such precision.
        UnsupportedImageSizeError: if the checkpoint cannot read images of that size.
        GraphMismatchError: if a graph differs from PyTorch.
        FileExistsError: if the version is there already.
        OtherFormatError: if the versions that are there have another format.
    """
    if (output / files.DECODER / str(version)).exists():
        raise FileExistsError(f"version {version} is in the model repository already")
    if precision is not Precision.FP32 and graph_format is not GraphFormat.ONNX:
        raise UnsupportedFormatError(f"{graph_format.value} is written in fp32 only")
    _refuse_other_format(output, graph_format)
    progress("loading the checkpoint")
    checkpoint = load_checkpoint(checkpoint_name, image_size)
    # A new repository is published by one renaming, and so made beside its place.
    with (
        tempfile.TemporaryDirectory(dir=_existing(output), prefix=".export-") as made,
        utf8_path(Path(made)) as folder,
    ):
        staging = folder / Precision.FP32.value
        graphs = _export_graphs(checkpoint, staging, version, graph_format, progress)
        _write_settings(checkpoint, staging, version, precision)
        agreement: Mapping[str, float] = {}
        if precision is not Precision.FP32:
            fp32, staging = staging, folder / precision.value
            progress(f"quantising the graphs to {precision.value}")
            graphs = _quantised(fp32, graphs, staging, precision)
            progress("comparing the captions with those of fp32")
            agreement = compare(fp32, staging)
        progress("comparing the graphs with PyTorch")
        verification = verify_export(checkpoint, graphs, precision)
        written = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
        _publish(staging, output, version, graph_format)
    return ExportReport(
        repository=output,
        version=version,
        graph_format=graph_format,
        precision=precision,
        image_size=checkpoint.image_size,
        bytes_on_disk=written,
        verification=verification,
        agreement=agreement,
        unknown_tokens=checkpoint.unknown_tokens,
    )


def static_repository() -> Path:
    """The models' configuration and code, as they are kept in the package."""
    return Path(str(resources.files("captionserve_server") / "model_repository"))


def _refuse_other_format(repository: Path, graph_format: GraphFormat) -> None:
    """All versions of a model share its config.pbtxt, which names one backend and one file."""
    config = repository / files.VISION_ENCODER / "config.pbtxt"
    if not config.exists():
        return
    text = config.read_text()
    for present in GraphFormat:
        if present is not graph_format and _backend_line(present) in text:
            raise OtherFormatError(
                f"the model repository holds versions in {present.value}, and all versions share "
                f"one configuration: {graph_format.value} needs a model repository of its own"
            )


def _backend_line(graph_format: GraphFormat) -> str:
    return f'backend: "{graph_format.backend}"'


def _export_graphs(
    checkpoint: Checkpoint,
    staging: Path,
    version: int,
    graph_format: GraphFormat,
    progress: Progress,
) -> dict[str, Path]:
    """Write the graphs; the path of each by its file name in ONNX."""
    exporter = _EXPORTERS[graph_format]
    jobs = (
        (exporter.export_encoder, files.VISION_ENCODER, files.ENCODER_GRAPH_FILE),
        (exporter.export_prefill, files.DECODER, files.PREFILL_GRAPH_FILE),
        (exporter.export_step, files.DECODER, files.STEP_GRAPH_FILE),
        (exporter.export_top, files.DECODER, files.TOP_GRAPH_FILE),
    )
    graphs: dict[str, Path] = {}
    for export, model, name in jobs:
        path = _version_folder(staging, model, version) / graph_format.file(name)
        progress(f"exporting {path.name} of {model}")
        export(checkpoint, path)
        graphs[name] = path
    return graphs


def _quantised(
    fp32: Path, graphs: Mapping[str, Path], target: Path, precision: Precision
) -> dict[str, Path]:
    """Copy a staged repository with its graphs in another precision; the graphs' paths in it."""
    shutil.copytree(fp32, target, ignore=shutil.ignore_patterns(*_QUANTISERS))
    paths = {name: target / path.relative_to(fp32) for name, path in graphs.items()}
    for name, quantise in _QUANTISERS.items():
        quantise(graphs[name], paths[name], precision)
    return paths


def _write_settings(
    checkpoint: Checkpoint, staging: Path, version: int, precision: Precision
) -> None:
    bundle = dataclasses.replace(checkpoint.bundle, precision=precision.value)
    folder = _version_folder(staging, files.DECODER, version)
    (folder / files.BUNDLE_FILE).write_text(bundle.to_json())
    checkpoint.tokenizer.backend_tokenizer.save(str(folder / files.TOKENIZER_FILE), pretty=False)
    settings = json.dumps(dataclasses.asdict(checkpoint.preprocessor), indent=2)
    (folder / files.PREPROCESSOR_FILE).write_text(settings + "\n")


def _version_folder(repository: Path, model: str, version: int) -> Path:
    folder = repository / model / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _existing(folder: Path) -> Path:
    """The folder, or the first of those that it is to lie in that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


def _publish(staging: Path, output: Path, version: int, graph_format: GraphFormat) -> None:
    """Move a staged version to its place, with the models' code and configuration."""
    static = static_repository()
    for model in files.MODELS:
        source = _version_folder(staging, model, version)
        code = static / model / "1" / "model.py"
        if code.exists():
            shutil.copyfile(code, source / code.name)
        config = (static / model / "config.pbtxt").read_text()
        if model == files.VISION_ENCODER:
            config = _in_format(config, graph_format)
        (source.parent / "config.pbtxt").write_text(config)
    if output.is_dir():
        _add(staging, output, version)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(output)


def _add(staging: Path, output: Path, version: int) -> None:
    """Move a version of every model into a repository that exists; all of them or none."""
    with ExitStack() as undo:
        for model in files.MODELS:
            source, target = staging / model, output / model
            if not target.is_dir():
                source.rename(target)
                undo.callback(target.rename, source)
                continue
            (source / str(version)).rename(target / str(version))
            undo.callback((target / str(version)).rename, source / str(version))
            # What was there goes to where the new one came from, to be put back.
            config, kept = target / "config.pbtxt", source / "config.pbtxt.before"
            if config.exists():
                shutil.copyfile(config, kept)
                undo.callback(kept.replace, config)
            else:
                undo.callback(config.unlink, missing_ok=True)
            (source / "config.pbtxt").replace(config)
        undo.pop_all()


def _in_format(config: str, graph_format: GraphFormat) -> str:
    """A graph's configuration, which is kept for ONNX, for another format."""
    static = GraphFormat.ONNX
    changes = {
        _backend_line(static): _backend_line(graph_format),
        f'"{files.ENCODER_GRAPH_FILE}"': f'"{graph_format.file(files.ENCODER_GRAPH_FILE)}"',
        f'"{static.thread_parameter}"': f'"{graph_format.thread_parameter}"',
    }
    for kept, wanted in changes.items():
        config = config.replace(kept, wanted)
    return config
