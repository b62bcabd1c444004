"""Triton's `onnxruntime` and `pytorch` backends on the Python wheels, for servers without them.

A python-based backend: the folder of that name in the backend directory holds a model.py that
imports this, and the same config.pbtxt runs here and on the C++ backend. Triton's dynamic batcher
hands several requests at once; they are joined into one run and parted again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.runtime.open_graph import open_graph
from captionserve_server.triton.pb import (
    Array,
    ModelArguments,
    Request,
    error_response,
    show_life,
)


class TritonPythonModel:
    """Any batched model of one graph with fixed inputs and outputs."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model file that the configuration names."""
        show_life()
        arguments = ModelArguments(args)
        folder = Path(arguments.repository) / str(arguments.version)
        path = folder / arguments.config["default_model_filename"]
        threads = arguments.threads(GraphFormat.of(path).thread_parameter)
        spinning = bool(arguments.number("spinning"))
        self._graph = open_graph(path, threads=threads, spinning=spinning)

    def execute(self, requests: list[Request]) -> list[Any]:
        """Run all requests as one batch; all of them fail together when the run fails."""
        try:
            batches = [self._inputs(request) for request in requests]
            joined = {
                name: np.concatenate([batch[name] for batch in batches])
                for name in self._graph.input_names
            }
            outputs = self._graph.run(joined)
        except Exception as error:  # Whatever goes wrong is these requests' answer.
            return [error_response(error) for _ in requests]
        sizes = [len(batch[self._graph.input_names[0]]) for batch in batches]
        parted = [np.split(output, np.cumsum(sizes)[:-1]) for output in outputs]
        return [self._response(list(parts)) for parts in zip(*parted, strict=True)]

    def _inputs(self, request: Request) -> dict[str, Array]:
        return {
            name: pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in self._graph.input_names
        }

    def _response(self, parts: list[Array]) -> Any:
        names = self._graph.output_names
        return pb_utils.InferenceResponse(
            output_tensors=[
                pb_utils.Tensor(name, np.ascontiguousarray(part))
                for name, part in zip(names, parts, strict=True)
            ]
        )
