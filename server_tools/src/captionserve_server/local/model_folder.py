"""Finding and loading what `captionserve export` wrote, without Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from captionserve_server.core.bundle import Bundle
from captionserve_server.core.preprocessing import PreprocessorConfig
from captionserve_server.runtime import model_repository as files
from captionserve_server.runtime.any_path import utf8_path
from captionserve_server.runtime.decoder_graphs import DecoderGraphs, TimedGraph
from captionserve_server.runtime.onnx_graph import OnnxGraph
from captionserve_server.runtime.tokenizer import CaptionTokenizer


class ModelFolderError(OSError):
    """A folder is no complete model repository; the message names what is wrong with it."""


@dataclass(frozen=True)
class LoadedModel:
    """One version of a model repository, in memory.

    Attributes:
        version: which version it is.
        bundle: what the checkpoint says.
        tokenizer: the checkpoint's.
        preprocessor: what the checkpoint's image processor does.
        encoder: pixels to encoder states.
        decoder: the decoder's graphs.
    """

    version: int
    bundle: Bundle
    tokenizer: CaptionTokenizer
    preprocessor: PreprocessorConfig
    encoder: OnnxGraph
    decoder: DecoderGraphs


def load_model(folder: Path, *, version: int | None, threads: int) -> LoadedModel:
    """Load a version of a model repository.

    Args:
        folder: as `captionserve export` writes it.
        version: which version; None for the newest.
        threads: of ONNX Runtime for one run; 0 is one per core.

    Raises:
        ModelFolderError: if something is missing or damaged.
    """
    found = _VersionFiles(folder, _newest_version(folder) if version is None else version)
    # Small files first: what is wrong shows before anything large is read.
    with found.reading(files.DECODER, files.BUNDLE_FILE) as path:
        bundle = Bundle.from_json(path.read_text())
    with found.reading(files.DECODER, files.TOKENIZER_FILE) as path:
        tokenizer = CaptionTokenizer.from_file(path)
    with found.reading(files.DECODER, files.PREPROCESSOR_FILE) as path:
        preprocessor = PreprocessorConfig.from_json(json.loads(path.read_text()))
    encoder = found.graph(files.VISION_ENCODER, files.ENCODER_GRAPH_FILE, threads)
    names = (files.PREFILL_GRAPH_FILE, files.STEP_GRAPH_FILE, files.TOP_GRAPH_FILE)
    graphs = [found.graph(files.DECODER, name, threads) for name in names]
    return LoadedModel(
        version=found.version,
        bundle=bundle,
        tokenizer=tokenizer,
        preprocessor=preprocessor,
        encoder=encoder,
        decoder=DecoderGraphs(*(TimedGraph(graph) for graph in graphs)),
    )


class _VersionFiles:
    """The files of one version of a model repository."""

    def __init__(self, folder: Path, version: int) -> None:
        self._folder = folder
        self.version = version

    @contextmanager
    def reading(self, model: str, name: str) -> Iterator[Path]:
        """A file's path; what goes wrong with it inside is said of it by name."""
        relative = Path(model, str(self.version), name)
        path = self._folder / relative
        if not path.is_file():
            raise ModelFolderError(
                f"{self._folder} has no {relative}; "
                "a folder that `captionserve export` wrote as ONNX is wanted"
            )
        try:
            with utf8_path(path.parent) as parent:
                yield parent / name
        except Exception as error:  # Each library has its own for a file that it cannot read.
            raise ModelFolderError(f"{relative} of {self._folder} cannot be loaded") from error

    def graph(self, model: str, name: str, threads: int) -> OnnxGraph:
        """Load a graph; the process has the cores to itself, so its threads may spin."""
        with self.reading(model, name) as path:
            return OnnxGraph(path, threads=threads)


def _newest_version(folder: Path) -> int:
    versions = [
        int(path.name) for path in (folder / files.DECODER).glob("*/") if path.name.isdecimal()
    ]
    if not versions:
        raise ModelFolderError(f"{folder}: {files.what_is_missing(folder)}")
    return max(versions)
