"""What machine this is, and what it can do: matrix products and reading memory, measured."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
from onnx import TensorProto, helper, numpy_helper

from captionserve_server.bench.cost_model import MachineRates
from captionserve_server.runtime.cores import available_cores

# Rows, inner width and columns of the matrix product: a feed-forward layer over many images.
_PRODUCT = (1024, 1024, 4096)
# Far more than any cache holds, in all threads together.
_READ_BYTES = 512 * 2**20
_REPEATS = 5
# Instruction sets that decide how fast these are.
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def machine_facts() -> dict[str, object]:
    """Cores, processor and memory; no names and no paths."""
    model, flags = _processor()
    return {
        "cores": available_cores(),
        "processor": model,
        "instructions": [flag for flag in _TELLING_FLAGS if flag in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "architecture": platform.machine(),
    }


def _processor() -> tuple[str, set[str]]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    parted = (line.partition(":") for line in lines)
    fields = {name.strip(): value.strip() for name, _, value in parted}
    return fields.get("model name", "unknown"), set(fields.get("flags", "").split())


class MachineProbe:
    """Measures the machine whenever asked, in the same way."""

    def __init__(self) -> None:
        """Make the products and the array to read."""
        rows, inner, columns = _PRODUCT
        rng = np.random.default_rng(0)
        self._inputs = {"left": rng.standard_normal((rows, inner), np.float32)}
        right = rng.standard_normal((inner, columns), np.float32)
        self._float_product = _session("MatMul", "", {"right": right})
        quantised: dict[str, Any] = {
            "right": rng.integers(-64, 64, (inner, columns), np.int8),
            "scale": np.full(1, 0.01, np.float32),
        }
        self._int8_product = _session("DynamicQuantizeMatMul", "com.microsoft", quantised)
        values = _READ_BYTES // np.dtype(np.float32).itemsize // available_cores()
        self._arrays = [np.ones(values, np.float32) for _ in range(available_cores())]

    def measure(self) -> MachineRates:
        """What the machine does now, at its best of a few times."""
        operations = 2.0 * math.prod(_PRODUCT)
        return MachineRates(
            fp32_flops=operations / _shortest(lambda: self._float_product.run(None, self._inputs)),
            int8_flops=operations / _shortest(lambda: self._int8_product.run(None, self._inputs)),
            bytes=_READ_BYTES / _shortest(self._read),
        )

    def _read(self) -> None:
        """Read all arrays, each with a core of its own."""
        with ThreadPoolExecutor(len(self._arrays)) as pool:
            list(pool.map(lambda array: np.dot(array, array), self._arrays))


def _shortest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _session(operator: str, domain: str, weights: dict[str, Any]) -> onnxruntime.InferenceSession:
    """A graph of one product with constant weights."""
    node = helper.make_node(operator, ["left", *weights], ["product"], domain=domain)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("left", TensorProto.FLOAT, [None, None])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, [None, None])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
