"""KServe v2 messages to and from plain values; pure, no I/O.

Tensors travel as raw bytes: little-endian numbers, and strings each behind a 4-byte length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from captionserve_server.core.tensors import DataType, ModelSpec, TensorSpec

_STRING_TYPE: DataType = "TYPE_STRING"
_NUMPY_TYPES: dict[DataType, str] = {
    "TYPE_UINT8": "u1",
    "TYPE_INT32": "<i4",
    "TYPE_INT64": "<i8",
    "TYPE_FP32": "<f4",
    "TYPE_FP64": "<f8",
}
_LENGTH = struct.Struct("<I")

Element = bytes | str | int | float


def infer_request(
    model: ModelSpec, inputs: Mapping[TensorSpec, Element], timeout_microseconds: int
) -> service_pb2.ModelInferRequest:
    """A request of one-element tensors.

    Args:
        model: whom to ask.
        inputs: each input's only element.
        timeout_microseconds: the time left, for Triton's queues and the model itself.
    """
    request = service_pb2.ModelInferRequest(model_name=model.name)
    request.parameters["timeout"].int64_param = timeout_microseconds
    for spec, element in inputs.items():
        request.inputs.add(name=spec.name, datatype=kserve_type(spec.data_type), shape=[1])
        request.raw_input_contents.append(_encode(spec.data_type, element))
    return request


def read_outputs(
    response: service_pb2.ModelInferResponse, specs: Iterable[TensorSpec]
) -> dict[TensorSpec, NDArray[Any]]:
    """The outputs as arrays of the shape that the response gives; strings as str objects.

    Raises:
        ValueError: if an output is missing or is not what its spec says.
    """
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    found = {output.name: (output, raw) for output, raw in pairs}
    arrays: dict[TensorSpec, NDArray[Any]] = {}
    for spec in specs:
        if spec.name not in found:
            raise ValueError(f"output {spec.name} is missing")
        output, raw = found[spec.name]
        if output.datatype != kserve_type(spec.data_type) or len(output.shape) != len(spec.dims):
            raise ValueError(f"output {spec.name} is {output.datatype} {list(output.shape)}")
        arrays[spec] = _decode(spec.data_type, raw).reshape(tuple(output.shape))
    return arrays


def kserve_type(data_type: DataType) -> str:
    """The name that the KServe protocol has for a type of Triton's configuration."""
    return "BYTES" if data_type == _STRING_TYPE else data_type.removeprefix("TYPE_")


def encode_strings(strings: Iterable[bytes]) -> bytes:
    """The raw bytes of a string tensor."""
    return b"".join(_LENGTH.pack(len(string)) + string for string in strings)


def decode_strings(raw: bytes) -> list[bytes]:
    """The elements of a string tensor's raw bytes.

    Raises:
        ValueError: if the bytes end within an element.
    """
    strings: list[bytes] = []
    position = 0
    while position < len(raw):
        begin = position + _LENGTH.size
        if begin > len(raw):
            raise ValueError("a string's length is cut off")
        position = begin + _LENGTH.unpack_from(raw, position)[0]
        if position > len(raw):
            raise ValueError("a string is cut off")
        strings.append(raw[begin:position])
    return strings


def _encode(data_type: DataType, element: Element) -> bytes:
    if data_type == _STRING_TYPE:
        text = element if isinstance(element, bytes) else str(element).encode()
        return encode_strings([text])
    return np.array([element], dtype=_NUMPY_TYPES[data_type]).tobytes()


def _decode(data_type: DataType, raw: bytes) -> NDArray[Any]:
    if data_type == _STRING_TYPE:
        return np.array([string.decode() for string in decode_strings(raw)], dtype=np.object_)
    return np.frombuffer(raw, dtype=_NUMPY_TYPES[data_type])
