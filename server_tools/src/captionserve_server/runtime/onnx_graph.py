"""One exported graph in an ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from captionserve_server.runtime.graph import Array

# How a run's work is shared out; docs/adr/0011 has what was measured.
_THREAD_POOL = {
    # Spinning ends with the run.
    "session.force_spinning_stop": "1",
    # Ever smaller pieces of an operator, so that no thread waits long for one that lost its core.
    "session.dynamic_block_base": "4",
}


class OnnxGraph:
    """An ONNX file, loaded and ready to run on the CPU."""

    def __init__(self, path: Path, *, threads: int = 0, spinning: bool = True) -> None:
        """Load a graph.

        Args:
            path: the .onnx file.
            threads: threads of one run; 0 lets ONNX Runtime take one per core.
            spinning: whether threads poll for work between a run's operators instead of sleeping.
                Between runs they sleep in any case, so that other processes have the cores.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        for name, value in _THREAD_POOL.items():
            options.add_session_config_entry(name, value)
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
            into: arrays of the outputs' names, shapes and types, one for each, which are written.
        """
        if into is None:
            outputs: list[Array] = self._session.run(None, dict(inputs))
            return outputs
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        written = [into[name] for name in self.output_names]
        for name, array in zip(self.output_names, written, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        return written
