"""One exported graph as a TorchScript module."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captionserve_server.runtime.graph import Array

NAMES_FILE = "tensor_names.json"
"""Beside the code in a .pt file: {"inputs": [...], "outputs": [...]}, in the graph's order.

TorchScript itself keeps no names of outputs."""


class TorchScriptGraph:
    """A TorchScript file, loaded and ready to run on the CPU."""

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        """Load a graph.

        Args:
            path: the .pt file, as `export` writes it.
            threads: threads of one run; 0 leaves PyTorch's own choice, one per core. PyTorch has
                one number for the whole process: the graph that was loaded last sets it for all.

        Raises:
            ValueError: if the file does not carry its tensors' names.
        """
        if threads:
            torch.set_num_threads(threads)
        # Graphs only read their inputs, so arrays may be read-only.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        carried = {NAMES_FILE: ""}
        with warnings.catch_warnings():
            # It is deprecated, and served all the same; see docs/adr/0010.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._module = torch.jit.load(str(path), map_location="cpu", _extra_files=carried)
        if not carried[NAMES_FILE]:
            raise ValueError(f"{path.name} does not carry its tensors' names; export it anew")
        names = json.loads(carried[NAMES_FILE])
        self.input_names: list[str] = names["inputs"]
        self.output_names: list[str] = names["outputs"]

    def run(
        self, inputs: Mapping[str, Array], into: Mapping[str, Array] | None = None
    ) -> list[Array]:
        """All outputs, in the graph's order.

        Args:
            inputs: arrays by name; they are read where they lie.
            into: arrays of the outputs' names, shapes and types, one for each, which are written.
        """
        arguments = [torch.from_numpy(inputs[name]) for name in self.input_names]
        # Optimised execution profiles the first runs and compiles anew, which takes seconds; for
        # these graphs it is no faster then.
        plainly = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
        with torch.inference_mode(), plainly:
            answer = self._module(*arguments)
        tensors = [answer] if isinstance(answer, Tensor) else answer
        outputs = [tensor.numpy() for tensor in tensors]
        if into is None:
            return outputs
        written = [into[name] for name in self.output_names]
        for array, output in zip(written, outputs, strict=True):
            np.copyto(array, output, casting="no")
        return written
