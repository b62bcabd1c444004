"""What machine this is, and what it can do: matrix products and reading memory, measured."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version

import numpy as np
import psutil
from numpy.typing import NDArray
from onnx import numpy_helper, parser
from onnxruntime import InferenceSession

from captionserve_server.bench.cost_model import MachineRates
from captionserve_server.runtime.cores import available_cores
from captionserve_server.runtime.processor import processor

# Rows, inner width and columns of the matrix product: a feed-forward layer over many images.
_PRODUCT = (1024, 1024, 4096)
# Far more than any cache holds, in all threads together.
_READ_BYTES = 512 * 2**20
_REPEATS = 5
# Optimum's are said where it is installed.
_PACKAGES = ("captionserve-server", "onnxruntime", "torch", "transformers", "tritonclient")


def machine_facts() -> dict[str, object]:
    """Cores, processor, memory and the packages that are measured; no names and no paths."""
    cpu = processor()
    return {
        "cores": available_cores(),
        "processor": cpu.name,
        "instructions": list(cpu.instructions),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "versions": {name: version(name) for name in _PACKAGES},
    }


class MachineProbe:
    """Measures the machine whenever asked, in the same way."""

    def __init__(self) -> None:
        """Make the products and the arrays to read."""
        rows, inner, columns = _PRODUCT
        rng = np.random.default_rng(0)
        left = rng.standard_normal((rows, inner), np.float32)
        right = rng.standard_normal((inner, columns), np.float32)
        self._fp32 = _product("MatMul(left, right)", left, right=right)
        self._int8 = _product(
            "com.microsoft.DynamicQuantizeMatMul(left, right, scale)",
            left,
            right=rng.integers(-64, 64, (inner, columns), np.int8),
            scale=np.full(1, 0.01, np.float32),
        )
        values = _READ_BYTES // np.dtype(np.float32).itemsize // available_cores()
        self._arrays = [np.ones(values, np.float32) for _ in range(available_cores())]

    def measure(self) -> MachineRates:
        """What the machine does now, at its best of a few times."""
        fp32, int8, reading = (
            min(timeit.repeat(work, number=1, repeat=_REPEATS))
            for work in (self._fp32, self._int8, self._read)
        )
        operations = 2.0 * math.prod(_PRODUCT)
        return MachineRates(operations / fp32, operations / int8, _READ_BYTES / reading)

    def _read(self) -> None:
        # Each array has a core of its own.
        with ThreadPoolExecutor(len(self._arrays)) as pool:
            list(pool.map(lambda array: np.dot(array, array), self._arrays))


def _product(
    expression: str, left: NDArray[np.float32], **weights: NDArray[np.generic]
) -> Callable[[], object]:
    """What runs a graph of one product with constant weights, which ONNX Runtime packs once."""
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18, "com.microsoft" : 1]> '
        f"product (float[rows, inner] left) => (float[rows, columns] out) {{ out = {expression} }}"
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"left": left})
