"""Reading and answering Triton requests, and calling other models: what all Python models share.

`triton_python_backend_utils` exists only inside Triton's Python stub, and fills its classes in
after a model's module has been imported; so this module is imported by models only, and everything
is looked up when called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelFaultError,
    ModelUnavailableError,
    OverloadedError,
    from_wire,
)
from captionserve_server.runtime.cores import threads_of_graphs
from captionserve_server.triton.wire import ModelSpec, TensorSpec

Array = NDArray[Any]
Request = Any
"""A pb_utils.InferenceRequest; the stub's classes have no types."""


class ModelArguments:
    """What Triton tells a model at `initialize`."""

    def __init__(self, args: Mapping[str, str]) -> None:
        """Keep the arguments as Triton gave them."""
        self._config = json.loads(args["model_config"])
        self.repository = args["model_repository"]
        self.version = int(args["model_version"])

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, config.pbtxt as JSON."""
        config: dict[str, Any] = self._config
        return config

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self._config["name"])

    def number(self, name: str) -> int:
        """A whole number from the configuration's parameters."""
        return int(self._config["parameters"][name]["string_value"])

    def threads(self, name: str) -> int:
        """The threads of one run that a parameter sets; 0 follows from the cores there are."""
        return self.number(name) or threads_of_graphs()


def read(request: Request, spec: TensorSpec) -> Array | None:
    """An input as an array of the tensor's own dims; None when it was left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, spec.name)
    return None if tensor is None else tensor.as_numpy()


def read_required(request: Request, spec: TensorSpec) -> Array:
    """An input that must be there.

    Raises:
        InvalidRequestError: if it is not.
    """
    array = read(request, spec)
    if array is None:
        raise InvalidRequestError(f"input {spec.name} is missing")
    return array


def read_or_empty(request: Request, spec: TensorSpec) -> Array:
    """An input as an array; one without elements where it was left out."""
    array = read(request, spec)
    return _empty(spec) if array is None else array


def response(outputs: Mapping[TensorSpec, Array]) -> Any:
    """A response of the given outputs."""
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor(spec.name, array) for spec, array in outputs.items()]
    )


def error_response(error: Exception) -> Any:
    """A response that carries an error; one that is not ours becomes a fault without its text."""
    if not isinstance(error, CaptionServeError):
        pb_utils.Logger.log_error(f"unexpected {type(error).__name__}: {error}")
        error = ModelFaultError("the model failed")
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(error.to_wire(), _triton_code(error))
    )


def _triton_code(error: CaptionServeError) -> Any:
    if isinstance(error, InvalidRequestError):
        return pb_utils.TritonError.INVALID_ARG
    if isinstance(error, CancelledError):
        return pb_utils.TritonError.CANCELLED
    if isinstance(error, (OverloadedError, ModelUnavailableError, DeadlineExceededError)):
        return pb_utils.TritonError.UNAVAILABLE
    return pb_utils.TritonError.INTERNAL


def call_model(
    model: ModelSpec, version: int, inputs: Mapping[TensorSpec, Array], *outputs: TensorSpec
) -> list[Array]:
    """Run another model of this server and return the outputs asked for.

    An output that the model left out is an array without elements.

    Raises:
        CaptionServeError: the model's own error, or ModelFaultError for any other failure.
    """
    request = pb_utils.InferenceRequest(
        model_name=model.name,
        model_version=version,
        requested_output_names=[spec.name for spec in outputs],
        inputs=[pb_utils.Tensor(spec.name, array) for spec, array in inputs.items()],
    )
    answer = request.exec()
    if answer.has_error():
        text = answer.error().message()
        error = from_wire(text)
        if error is None:
            pb_utils.Logger.log_error(f"{model.name}: {text}")
            error = ModelFaultError("a model failed")
        raise error
    return [_output(answer, spec) for spec in outputs]


def _output(answer: Any, spec: TensorSpec) -> Array:
    tensor = pb_utils.get_output_tensor_by_name(answer, spec.name)
    return _empty(spec) if tensor is None else tensor.as_numpy()


def _empty(spec: TensorSpec) -> Array:
    return np.empty((0,) * len(spec.dims), pb_utils.triton_string_to_numpy(spec.data_type))


def text_array(*texts: str | bytes) -> Array:
    """Strings as Triton's TYPE_STRING wants them."""
    encoded = [text if isinstance(text, bytes) else text.encode() for text in texts]
    return np.array(encoded, dtype=np.object_)
