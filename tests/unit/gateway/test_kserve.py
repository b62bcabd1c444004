"""Plain values to tensors as they travel, and back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from captionserve_server.gateway.kserve import (
    InputTensor,
    decode_strings,
    encode_strings,
    infer_request,
    read_outputs,
)
from captionserve_server.triton.wire import DataType, ModelSpec, TensorSpec
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

E_ACUTE = "\N{LATIN SMALL LETTER E WITH ACUTE}"


def spec_of(data_type: DataType, rank: int = 1, name: str = "VALUES") -> TensorSpec:
    return TensorSpec(name, data_type, (-1,) * rank)


def response_with(
    datatype: str, shape: Sequence[int], raw: bytes
) -> service_pb2.ModelInferResponse:
    response = service_pb2.ModelInferResponse(raw_output_contents=[raw])
    response.outputs.add(name="VALUES", datatype=datatype, shape=shape)
    return response


def test_a_request_has_its_model_its_id_its_time_and_its_inputs() -> None:
    first = InputTensor(TensorSpec("FIRST", "TYPE_STRING", (1,)), (1,), encode_strings([b"a"]))
    second = InputTensor(TensorSpec("SECOND", "TYPE_FP32", (3, -1, -1)), (3, 1, 1), bytes(12))
    sent = infer_request(
        ModelSpec("a_model", (first.spec, second.spec), ()),
        [first, second],
        version=2,
        request_id="17",
        parameters={"timeout": 2_500_000, "wants": True},
    )
    request = service_pb2.ModelInferRequest.FromString(sent)
    assert (request.model_name, request.model_version, request.id) == ("a_model", "2", "17")
    assert request.parameters["timeout"].int64_param == 2_500_000
    assert request.parameters["wants"].bool_param
    assert [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in request.inputs] == [
        ("FIRST", "BYTES", [1]),
        ("SECOND", "FP32", [3, 1, 1]),
    ]
    assert list(request.raw_input_contents) == [encode_strings([b"a"]), bytes(12)]


@given(st.lists(st.sampled_from([0, 1, 127, 128, 2**14 - 1, 2**14, 2**21]), max_size=4))
def test_a_request_is_what_protobuf_itself_writes(sizes: list[int]) -> None:
    specs = [TensorSpec(f"T{at}", "TYPE_UINT8", (-1,)) for at in range(len(sizes))]
    inputs = [
        InputTensor(spec, (size,), bytes([at + 1]) * size)
        for at, (spec, size) in enumerate(zip(specs, sizes, strict=True))
    ]
    sent = infer_request(
        ModelSpec("a_model", tuple(specs), ()), inputs, version=1, request_id="", parameters={}
    )
    expected = service_pb2.ModelInferRequest(
        model_name="a_model",
        model_version="1",
        raw_input_contents=[tensor.raw for tensor in inputs],
    )
    for tensor in inputs:
        expected.inputs.add(name=tensor.spec.name, datatype="UINT8", shape=tensor.shape)
    assert service_pb2.ModelInferRequest.FromString(sent) == expected


@pytest.mark.parametrize(
    "strings", [[], [b""], [b"", b"", b"a"], [b"one", E_ACUTE.encode(), b"\x00\x00\x00\x00"]]
)
def test_strings_come_back_as_they_went(strings: list[bytes]) -> None:
    assert decode_strings(encode_strings(strings)) == strings


@pytest.mark.parametrize("cut", range(1, 9))
def test_strings_that_are_cut_off_are_refused(cut: int) -> None:
    # The second element's length takes 4 bytes and its text 5.
    with pytest.raises(ValueError, match="cut off"):
        decode_strings(encode_strings([b"one", b"three"])[:-cut])


@pytest.mark.parametrize(
    ("data_type", "datatype", "shape", "raw", "expected"),
    [
        ("TYPE_BOOL", "BOOL", [2], b"\x00\x01", [False, True]),
        ("TYPE_INT32", "INT32", [2, 1], struct.pack("<2i", 5, -1), [5, -1]),
        ("TYPE_INT64", "INT64", [1], struct.pack("<q", -(2**63)), [-(2**63)]),
        ("TYPE_FP32", "FP32", [1, 2], struct.pack("<2f", 0.5, -2), [0.5, -2.0]),
        ("TYPE_FP64", "FP64", [1], struct.pack("<d", 0.1), [0.1]),
        ("TYPE_STRING", "BYTES", [2, 1], encode_strings([b"", b"a"]), ["", "a"]),
        ("TYPE_STRING", "BYTES", [1], encode_strings([E_ACUTE.encode()]), [E_ACUTE]),
        ("TYPE_STRING", "BYTES", [0], b"", []),
        ("TYPE_INT32", "INT32", [1, 0], b"", []),
    ],
)
def test_outputs_of_every_type_are_read(
    data_type: DataType, datatype: str, shape: list[int], raw: bytes, expected: list[Any]
) -> None:
    spec = spec_of(data_type, len(shape))
    found = read_outputs(response_with(datatype, shape, raw), {spec.name: spec})[spec.name]
    assert list(found.values) == expected
    assert found.shape == tuple(shape)


def test_only_outputs_that_are_known_and_there_are_read() -> None:
    known, missing = spec_of("TYPE_BOOL"), spec_of("TYPE_BOOL", name="MISSING")
    response = response_with("BOOL", [1], b"\x01")
    response.outputs.add(name="UNKNOWN", datatype="FP32", shape=[1])
    response.raw_output_contents.append(np.float32(1).tobytes())
    specs = {spec.name: spec for spec in (missing, known)}
    assert set(read_outputs(response, specs)) == {known.name}


@pytest.mark.parametrize(
    ("data_type", "datatype", "shape", "raw"),
    [
        pytest.param("TYPE_INT32", "INT64", [1], bytes(8), id="type"),
        pytest.param("TYPE_INT32", "INT32", [1, 1], bytes(4), id="rank"),
        pytest.param("TYPE_INT32", "INT32", [2], bytes(4), id="too few bytes"),
        pytest.param("TYPE_INT32", "INT32", [1], bytes(8), id="too many bytes"),
        pytest.param("TYPE_INT32", "INT32", [1], bytes(3), id="part of an element"),
        pytest.param("TYPE_STRING", "BYTES", [2], encode_strings([b"a"]), id="too few strings"),
        pytest.param("TYPE_STRING", "BYTES", [1], encode_strings([b"\xff"]), id="no UTF-8"),
    ],
)
def test_an_output_that_is_not_what_it_says_is_refused(
    data_type: DataType, datatype: str, shape: list[int], raw: bytes
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - numpy's, struct's and our own texts.
        read_outputs(response_with(datatype, shape, raw), {"VALUES": spec_of(data_type)})


def test_an_output_without_its_bytes_is_refused() -> None:
    response = response_with("BOOL", [1], b"\x01")
    response.outputs.add(name="MORE", datatype="BOOL", shape=[1])
    with pytest.raises(ValueError, match="zip"):
        read_outputs(response, {"VALUES": spec_of("TYPE_BOOL")})
