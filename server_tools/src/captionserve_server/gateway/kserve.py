"""KServe v2 messages to and from plain values; pure, no I/O.

Tensors travel as raw bytes: little-endian numbers, and strings each behind a 4-byte length.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from captionserve_server.triton.wire import DataType, ModelSpec, TensorSpec

_STRING_TYPE: DataType = "TYPE_STRING"
_NUMPY_TYPES: dict[DataType, str] = {
    "TYPE_BOOL": "?",
    "TYPE_UINT8": "u1",
    "TYPE_INT32": "<i4",
    "TYPE_INT64": "<i8",
    "TYPE_FP32": "<f4",
    "TYPE_FP64": "<f8",
}
_LENGTH = struct.Struct("<I")

Element = bytes | str | int | float
"""One value of a tensor; a bool is an int."""


def infer_request(
    model: ModelSpec,
    inputs: Mapping[TensorSpec, Sequence[Element]],
    *,
    request_id: str,
    timeout_microseconds: int,
) -> service_pb2.ModelInferRequest:
    """A request of one-dimensional tensors.

    Args:
        model: whom to ask.
        inputs: each input's elements.
        request_id: names the request in Triton's logs and in what it answers.
        timeout_microseconds: the time left, for Triton's queues and the model itself.
    """
    request = service_pb2.ModelInferRequest(model_name=model.name, id=request_id)
    request.parameters["timeout"].int64_param = timeout_microseconds
    for spec, elements in inputs.items():
        datatype = kserve_type(spec.data_type)
        request.inputs.add(name=spec.name, datatype=datatype, shape=[len(elements)])
        request.raw_input_contents.append(_encode(spec.data_type, elements))
    return request


def read_outputs(
    response: service_pb2.ModelInferResponse, specs: Iterable[TensorSpec]
) -> dict[TensorSpec, NDArray[Any]]:
    """The outputs that there are, as arrays of the response's shapes; strings as str objects.

    Raises:
        ValueError: if an output is not what its spec says.
    """
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    found = {output.name: (output, raw) for output, raw in pairs}
    arrays: dict[TensorSpec, NDArray[Any]] = {}
    for spec in specs:
        if spec.name not in found:
            continue
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


def _encode(data_type: DataType, elements: Sequence[Element]) -> bytes:
    if data_type == _STRING_TYPE:
        return encode_strings(
            element if isinstance(element, bytes) else str(element).encode() for element in elements
        )
    return np.array(elements, dtype=_NUMPY_TYPES[data_type]).tobytes()


def _decode(data_type: DataType, raw: bytes) -> NDArray[Any]:
    if data_type == _STRING_TYPE:
        return np.array([string.decode() for string in decode_strings(raw)], dtype=np.object_)
    return np.frombuffer(raw, dtype=_NUMPY_TYPES[data_type])
