"""A small stand-in of triton_python_backend_utils, and of the Triton around it.

It has what our models use of it, in one process: tensors are arrays, responses are kept by the
request's sender, and calls of other models go to functions that a test puts in their place.
"""

from __future__ import annotations

import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

FINAL = 1


class Tensor:
    """A named array."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name = name
        self._array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


class TritonError:
    """A text with a code."""

    INVALID_ARG, CANCELLED, UNAVAILABLE, INTERNAL = range(4)

    def __init__(self, text: str, code: int) -> None:
        self.text = text
        self.code = code

    def message(self) -> str:
        return self.text


class InferenceResponse:
    """Tensors or an error."""

    def __init__(
        self, output_tensors: Iterable[Tensor] = (), error: TritonError | None = None
    ) -> None:
        self._tensors = list(output_tensors)
        self._error = error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class Sender:
    """Where a request's responses go; as Triton's, it refuses any after the final one."""

    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.final = threading.Event()
        self.cancelled = False
        self.fails = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.final.is_set(), "a response after the final one"
        if flags:
            self.final.set()
        if self.fails:
            raise RuntimeError("the response cannot be sent")
        if response is not None:
            self.responses.append(response)

    def is_cancelled(self) -> bool:
        assert not self.final.is_set(), "Triton forgets a request with its final response"
        return self.cancelled


class InferenceRequest:
    """A request to a model of ours, or by one of ours to another model."""

    models: ClassVar[dict[str, Callable[[InferenceRequest], Iterable[InferenceResponse]]]] = {}
    """What answers for other models, by name."""

    def __init__(
        self,
        inputs: Iterable[Tensor] = (),
        request_id: str = "",
        timeout: int = 0,
        model_name: str = "",
        model_version: int = -1,
        requested_output_names: Iterable[str] = (),
    ) -> None:
        self.tensors = {tensor.name(): tensor for tensor in inputs}
        self.sender = Sender()
        self.model_name = model_name
        self.model_version = model_version
        self.requested = list(requested_output_names)
        self._id = request_id
        self._timeout = timeout
        self.parameters_json = ""

    def get_response_sender(self) -> Sender:
        return self.sender

    def request_id(self) -> str:
        return self._id

    def timeout(self) -> int:
        return self._timeout

    def parameters(self) -> str:
        return self.parameters_json

    def exec(self, decoupled: bool = False) -> Any:
        answers = self.models[self.model_name](self)
        return iter(answers) if decoupled else next(iter(answers))


class MetricFamily:
    """Metrics of one name; a test may make them fail."""

    COUNTER, GAUGE = "counter", "gauge"
    fails = False
    values: ClassVar[dict[str, float]] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name
        self.values[name] = 0.0

    def Metric(self, labels: dict[str, str]) -> MetricFamily:  # noqa: N802 - Triton's name.
        return self

    def set(self, value: float) -> None:
        self._check()
        self.values[self.name] = value

    def increment(self, value: float) -> None:
        self._check()
        self.values[self.name] += value

    def _check(self) -> None:
        if MetricFamily.fails:
            raise RuntimeError("the metric fails")


class Logger:
    """Keeps what is logged."""

    lines: ClassVar[list[str]] = []

    @classmethod
    def log_error(cls, text: str) -> None:
        cls.lines.append(text)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    """An input; None when it was left out."""
    return request.tensors.get(name)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    """An output; None when the model left it out."""
    return next((tensor for tensor in response.output_tensors() if tensor.name() == name), None)


def request_of(name: str = "", timeout: int = 0, **inputs: Any) -> InferenceRequest:
    """A request with inputs by name: text and bytes become string tensors, the rest arrays."""
    tensors = []
    for key, value in inputs.items():
        plain = value.encode() if isinstance(value, str) else value
        kind = np.object_ if isinstance(plain, bytes) else None
        array = plain if isinstance(plain, np.ndarray) else np.array([plain], dtype=kind)
        tensors.append(Tensor(key, array))
    return InferenceRequest(tensors, name, timeout)


def outputs_of(response: InferenceResponse) -> dict[str, NDArray[Any]]:
    """A response's arrays by name."""
    assert not response.has_error(), response.error()
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def installed() -> Iterator[types.ModuleType]:
    """Be triton_python_backend_utils while a test runs, with nothing logged and no model there."""
    module = types.ModuleType("triton_python_backend_utils")
    for each in (Tensor, TritonError, InferenceResponse, InferenceRequest, MetricFamily, Logger):
        setattr(module, each.__name__, each)
    for function in (get_input_tensor_by_name, get_output_tensor_by_name):
        setattr(module, function.__name__, function)
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]  # Made here.
    Logger.lines, InferenceRequest.models = [], {}
    MetricFamily.fails, MetricFamily.values = False, {}
    before = set(sys.modules)
    sys.modules[module.__name__] = module
    yield module
    # Models keep the module that they were imported with; the next test's are imported anew.
    for name in itertools.chain([module.__name__], set(sys.modules) - before):
        if name == module.__name__ or name.startswith("captionserve_server.triton."):
            sys.modules.pop(name, None)
            package, _, last = name.rpartition(".")
            if package in sys.modules:  # `from package import last` would find it there.
                vars(sys.modules[package]).pop(last, None)
