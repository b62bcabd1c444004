"""KServe v2 messages to and from plain values; pure, no I/O.

Tensors travel as raw bytes: little-endian numbers, and strings each behind a 4-byte length. They
are read with struct: for the few dozen values of a caption, arrays would cost more than they give.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tritonclient.grpc import service_pb2

from captionserve_server.triton.wire import DataType, ModelSpec, TensorSpec

_STRING_TYPE: DataType = "TYPE_STRING"
_STRUCT_TYPES: dict[DataType, str] = {
    "TYPE_BOOL": "?",
    "TYPE_UINT8": "B",
    "TYPE_INT32": "i",
    "TYPE_INT64": "q",
    "TYPE_FP32": "f",
    "TYPE_FP64": "d",
}
_LENGTH = struct.Struct("<I")


class InputTensor(NamedTuple):
    """An input as it travels."""

    spec: TensorSpec
    shape: tuple[int, ...]
    raw: bytes


class Tensor(NamedTuple):
    """An output: its shape, and its values in row-major order; strings are str."""

    shape: tuple[int, ...]
    values: Sequence[Any]


Outputs = Mapping[str, Tensor]
"""By name."""


def infer_request(
    model: ModelSpec,
    inputs: Iterable[InputTensor],
    *,
    version: int,
    request_id: str,
    parameters: Mapping[str, int | bool],
) -> bytes:
    """A ModelInferRequest with these inputs, serialised.

    The message is made without the inputs' bytes, which are put behind it as protobuf would: what
    is read one after the other is one message. So a picture of many megabytes is copied once, and
    not into the message and from there again.

    Args:
        model: whom to ask.
        inputs: those that are given.
        version: of the model.
        request_id: names the request in Triton's logs.
        parameters: of the request; numbers are of 64 bits.
    """
    request = service_pb2.ModelInferRequest(
        model_name=model.name, model_version=str(version), id=request_id
    )
    for name, value in parameters.items():
        if isinstance(value, bool):
            request.parameters[name].bool_param = value
        else:
            request.parameters[name].int64_param = value
    contents: list[bytes] = []
    for spec, shape, raw in inputs:
        request.inputs.add(name=spec.name, datatype=kserve_type(spec.data_type), shape=shape)
        contents += (_RAW_CONTENTS_TAG, _varint(len(raw)), raw)
    return b"".join((request.SerializeToString(), *contents))


def _varint(number: int) -> bytes:
    """A number as protobuf writes it: 7 bits a byte, the lowest first, plus 128 if more follow."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


# The field's number, and 2 for what has a length; one byte, as of every field before the 16th.
_RAW_CONTENTS_TAG = bytes(
    [service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number << 3 | 2]
)


def read_outputs(
    response: service_pb2.ModelInferResponse, specs: Mapping[str, TensorSpec]
) -> dict[str, Tensor]:
    """The outputs that there are and that have a spec.

    Args:
        response: the model's.
        specs: the outputs that are known, by name.

    Raises:
        ValueError: if an output is not what its spec says.
    """
    tensors: dict[str, Tensor] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        spec = specs.get(output.name)
        if spec is None:
            continue
        shape = tuple(output.shape)
        if output.datatype != kserve_type(spec.data_type) or len(shape) != len(spec.dims):
            raise ValueError(f"output {spec.name} is {output.datatype} {list(shape)}")
        values = _decode(spec.data_type, raw)
        if len(values) != math.prod(shape):
            raise ValueError(f"output {spec.name} has {len(values)} values for {list(shape)}")
        tensors[spec.name] = Tensor(shape, values)
    return tensors


def kserve_type(data_type: DataType) -> str:
    """The name that the KServe protocol has for a type of Triton's configuration."""
    return "BYTES" if data_type == _STRING_TYPE else data_type.removeprefix("TYPE_")


def encode_strings(strings: Iterable[bytes]) -> bytes:
    """The raw bytes of a string tensor."""
    return b"".join(part for string in strings for part in (_LENGTH.pack(len(string)), string))


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


def _decode(data_type: DataType, raw: bytes) -> Sequence[Any]:
    if data_type == _STRING_TYPE:
        return [string.decode() for string in decode_strings(raw)]
    code = _STRUCT_TYPES[data_type]
    count, rest = divmod(len(raw), struct.calcsize(f"<{code}"))
    if rest:
        raise ValueError("an element is cut off")
    return struct.unpack(f"<{count}{code}", raw)
