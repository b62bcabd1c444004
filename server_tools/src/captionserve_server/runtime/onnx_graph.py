"""One exported graph in an ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime

from captionserve_server.core.graph_step_model import Array


class OnnxGraph:
    """An ONNX file, loaded and ready to run on the CPU."""

    def __init__(self, path: Path, *, threads: int = 0, spinning: bool = False) -> None:
        """Load a graph.

        Args:
            path: the .onnx file.
            threads: threads of one run; 0 lets ONNX Runtime take one per core.
            spinning: whether idle threads keep polling for work. Faster for one process that has
                the cores to itself, slower where several share them.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        # 3 silences warnings about initialisers, which say nothing to the one who serves.
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.input_names = [node.name for node in self._session.get_inputs()]
        self.output_names = [node.name for node in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs, in the graph's order."""
        outputs: list[Array] = self._session.run(None, dict(inputs))
        return outputs
