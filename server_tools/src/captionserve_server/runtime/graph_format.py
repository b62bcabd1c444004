"""The formats that graphs can be exported in, and what follows from each for files and Triton."""

from __future__ import annotations

from enum import Enum
from pathlib import Path


class GraphFormat(str, Enum):
    """How a graph is written down."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"

    @property
    def suffix(self) -> str:
        """The end of its files' names."""
        return _SUFFIXES[self]

    @property
    def backend(self) -> str:
        """The Triton backend that serves it."""
        return _BACKENDS[self]

    @property
    def thread_parameter(self) -> str:
        """The model parameter from which that backend reads the threads of one run."""
        return _THREAD_PARAMETERS[self]

    def file(self, name: str) -> str:
        """The file's name in this format of the graph whose ONNX file has the given one."""
        return str(Path(name).with_suffix(self.suffix))

    @classmethod
    def of(cls, path: Path) -> GraphFormat:
        """The format of a graph's file, by the end of its name.

        Raises:
            ValueError: if it is none of these formats.
        """
        for graph_format in cls:
            if path.suffix == graph_format.suffix:
                return graph_format
        known = ", ".join(graph_format.suffix for graph_format in cls)
        raise ValueError(f"{path.name} is no graph: it ends in none of {known}")


_SUFFIXES = {GraphFormat.ONNX: ".onnx", GraphFormat.TORCHSCRIPT: ".pt"}
_BACKENDS = {GraphFormat.ONNX: "onnxruntime", GraphFormat.TORCHSCRIPT: "pytorch"}
_THREAD_PARAMETERS = {
    GraphFormat.ONNX: "intra_op_thread_count",
    GraphFormat.TORCHSCRIPT: "INTRA_OP_THREAD_COUNT",
}
