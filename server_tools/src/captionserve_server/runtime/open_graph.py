"""Opening a graph's file in whichever format it has: the one place that knows all of them."""

from __future__ import annotations

from pathlib import Path

from captionserve_server.runtime.graph import NamedGraph
from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.runtime.onnx_graph import OnnxGraph


class MissingTorchError(RuntimeError):
    """A TorchScript graph is to be run where PyTorch is not installed."""


def open_graph(path: Path, *, threads: int = 0, spinning: bool = True) -> NamedGraph:
    """Load a graph, ready to run on the CPU.

    Args:
        path: a graph's file; its suffix says which format it has.
        threads: threads of one run; 0 for one per core.
        spinning: see OnnxGraph; PyTorch's threads have ways of their own.

    Raises:
        ValueError: if the suffix is not a graph's.
        MissingTorchError: if the graph needs PyTorch, which is not there.
    """
    if GraphFormat.of(path) is GraphFormat.TORCHSCRIPT:
        return _open_torchscript(path, threads)
    return OnnxGraph(path, threads=threads, spinning=spinning)


def find_graph(folder: Path, name: str) -> Path:
    """The file of a graph, in the format that a version folder has it in.

    Args:
        folder: a version folder of a model.
        name: the graph's file name in ONNX.

    Raises:
        FileNotFoundError: if the folder has it in no format.
    """
    paths = [folder / graph_format.file(name) for graph_format in GraphFormat]
    for path in paths:
        if path.is_file():
            return path
    names = " nor ".join(path.name for path in paths)
    raise FileNotFoundError(f"{folder} has neither {names}")


def _open_torchscript(path: Path, threads: int) -> NamedGraph:
    # Imported here: ONNX is served without PyTorch, which takes seconds to import.
    try:
        from captionserve_server.runtime.torchscript_graph import TorchScriptGraph
    except ModuleNotFoundError as error:
        raise MissingTorchError(
            f"{path.name} needs PyTorch: install captionserve-server[torchscript]"
        ) from error
    return TorchScriptGraph(path, threads=threads)
