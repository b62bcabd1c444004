"""Triton's side of a request, in plain values: what all Python models share.

`triton_python_backend_utils` exists only inside Triton's Python stub, and fills its classes in
after a model's module has been imported; so this module is imported by models only, and everything
is looked up when called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from captionserve_server.core.engine.worker import Worker
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelFaultError,
    ModelUnavailableError,
    OverloadedError,
)
from captionserve_server.runtime.cores import threads_of_graphs
from captionserve_server.runtime.heartbeat import beat, heartbeat_folder
from captionserve_server.tracing import TRACE_HEADERS
from captionserve_server.triton.wire import ModelSpec, TensorSpec, error_of_text, error_text

Array = NDArray[Any]
Request = Any
"""A pb_utils.InferenceRequest; the stub's classes have no types."""
Response = Any
"""A pb_utils.InferenceResponse."""


class ModelArguments:
    """What Triton tells a model at `initialize`."""

    def __init__(self, args: Mapping[str, str]) -> None:
        """Keep the arguments as Triton gave them."""
        self._config = json.loads(args["model_config"])
        self.repository = args["model_repository"]
        self.model = args["model_name"]
        self.version = int(args["model_version"])

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, config.pbtxt as JSON."""
        config: dict[str, Any] = self._config
        return config

    def number(self, name: str) -> int:
        """A whole number from the configuration's parameters."""
        return int(self._config["parameters"][name]["string_value"])

    def threads(self, name: str) -> int:
        """The threads that a parameter sets; 0 follows from the cores there are."""
        return self.number(name) or threads_of_graphs()


def read(request: Request, spec: TensorSpec) -> Array | None:
    """An input as an array of the tensor's own dims; None when it was left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, spec.name)
    return None if tensor is None else tensor.as_numpy()


def read_bytes(request: Request, spec: TensorSpec) -> bytes | None:
    """A string tensor of one element; None when it was left out."""
    array = read(request, spec)
    return None if array is None else bytes(array[0])


def read_flag(request: Request, spec: TensorSpec) -> bool:
    """A boolean tensor of one element; False when it was left out."""
    array = read(request, spec)
    return array is not None and bool(array[0])


def trace_context(request: Request) -> dict[str, str]:
    """The headers that say of which trace a request is, as far as they can be read."""
    try:
        parameters = json.loads(request.parameters() or "{}")
    except ValueError:  # Over HTTP Triton takes any bytes.
        return {}
    return {name: str(parameters[name]) for name in TRACE_HEADERS if name in parameters}


def response(outputs: Mapping[TensorSpec, Array]) -> Response:
    """A response of the given outputs."""
    return pb_utils.InferenceResponse(
        output_tensors=[pb_utils.Tensor(spec.name, array) for spec, array in outputs.items()]
    )


def error_response(error: Exception) -> Response:
    """A response that carries an error; one that is not ours becomes a fault without its text."""
    if not isinstance(error, CaptionServeError):
        log_error(f"unexpected {type(error).__name__}: {error}")
        error = ModelFaultError("the model failed")
    return pb_utils.InferenceResponse(
        error=pb_utils.TritonError(error_text(error), _triton_code(error))
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
    model: ModelSpec, version: int, inputs: Mapping[TensorSpec, Array], output: TensorSpec
) -> Array:
    """Run another model of this server and return its output.

    Raises:
        CaptionServeError: the model's own error, or ModelFaultError for any other failure.
    """
    request = pb_utils.InferenceRequest(
        model_name=model.name,
        model_version=version,
        requested_output_names=[output.name],
        inputs=[pb_utils.Tensor(spec.name, array) for spec, array in inputs.items()],
    )
    answer = request.exec()
    _raise_error(model, answer)
    array: Array = pb_utils.get_output_tensor_by_name(answer, output.name).as_numpy()
    return array


def call_decoupled(
    model: ModelSpec,
    version: int,
    inputs: Mapping[TensorSpec, Array],
    outputs: Sequence[TensorSpec],
    *,
    request_id: str = "",
    timeout_microseconds: int = 0,
) -> Iterator[dict[TensorSpec, Array]]:
    """Run a decoupled model of this server; what it gives, response by response.

    Args:
        model: which.
        version: of the model.
        inputs: its inputs.
        outputs: of those, what is wanted; a response holds the ones that the model put into it.
        request_id: how the model shall know the request.
        timeout_microseconds: the time left; 0 for no limit.

    Raises:
        CaptionServeError: the model's own error, or ModelFaultError for any other failure.
    """
    request = pb_utils.InferenceRequest(
        model_name=model.name,
        model_version=version,
        request_id=request_id,
        requested_output_names=[spec.name for spec in outputs],
        inputs=[pb_utils.Tensor(spec.name, array) for spec, array in inputs.items()],
        timeout=timeout_microseconds,
    )
    specs = {spec.name: spec for spec in outputs}
    for answer in request.exec(decoupled=True):
        _raise_error(model, answer)
        tensors = {specs[tensor.name()]: tensor.as_numpy() for tensor in answer.output_tensors()}
        # Triton ends a run with a response of its own where the model's last one was not final.
        if tensors:
            yield tensors


def _raise_error(model: ModelSpec, answer: Response) -> None:
    if not answer.has_error():
        return
    text = answer.error().message()
    error = error_of_text(text)
    if error is None:
        log_error(f"{model.name}: {text}")
        error = ModelFaultError("a model failed")
    raise error


def text_array(*texts: str | bytes) -> Array:
    """Strings as Triton's TYPE_STRING wants them."""
    encoded = [text if isinstance(text, bytes) else text.encode() for text in texts]
    return np.array(encoded, dtype=np.object_)


def log_error(text: str) -> None:
    """Write a line into Triton's log."""
    pb_utils.Logger.log_error(text)


def show_life() -> None:
    """Give signs of life from now on, where somebody watches for them."""
    folder = heartbeat_folder()
    if folder is not None:
        Worker("heartbeat", partial(beat, folder), die)


def die(error: BaseException) -> None:
    """End the process, because a thread has ended that should not have."""
    log_error(f"the process ends: {type(error).__name__}: {error}")
    os._exit(1)
