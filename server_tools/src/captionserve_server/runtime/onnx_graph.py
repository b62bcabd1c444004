"""One exported graph in an ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
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

    def run(
        self, inputs: Mapping[str, Array], into: Mapping[str, Array] | None = None
    ) -> list[Array]:
        """All outputs, in the graph's order.

        Args:
            inputs: C-contiguous arrays by name; they are read where they lie.
            into: arrays that outputs of theirs names, shapes and types are written to.
        """
        if not into:
            outputs: list[Array] = self._session.run(None, dict(inputs))
            return outputs
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self.output_names:
            if name in into:
                _bind_output(binding, name, into[name])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        values = zip(self.output_names, binding.get_outputs(), strict=True)
        return [into[name] if name in into else value.numpy() for name, value in values]


def _bind_output(binding: onnxruntime.IOBinding, name: str, array: Array) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
