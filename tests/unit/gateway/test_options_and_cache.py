"""How options of every kind reach Triton, and what may come from its response cache."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import grpc
import numpy as np
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core import errors
from captionserve_server.gateway.kserve import encode_strings
from captionserve_server.triton import wire
from tritonclient.grpc import service_pb2

from tests.unit.gateway.fake_triton import (
    Answer,
    Context,
    FakeTriton,
    computed_for,
    good_outputs,
    infer_response,
    with_attention,
)
from tests.unit.gateway.harness import gateway_setup, request_of
from tests.unit.gateway.test_captions import answer_to, ask, raw_inputs
from tests.unit.gateway.test_failures import Failure, failing, failure_of, reason_of, without


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ({"do_sample": True}, "DO_SAMPLE", ("BOOL", [1], b"\x01")),
        ({"do_sample": False}, "DO_SAMPLE", ("BOOL", [1], b"\x00")),
        ({"seed": 2**62 + 1}, "SEED", ("INT64", [1], struct.pack("<q", 2**62 + 1))),
        ({"top_p": 0.9}, "TOP_P", ("FP64", [1], struct.pack("<d", 0.9))),
        ({"top_k": 0}, "TOP_K", ("INT32", [1], bytes(4))),
        ({"prefix": ""}, "PREFIX", ("BYTES", [1], encode_strings([b""]))),
        (
            {"bad_words": ["a cat", "caf\u00e9"]},
            "BAD_WORDS",
            ("BYTES", [2], encode_strings([b"a cat", b"caf\xc3\xa9"])),
        ),
        ({"force_words": [""]}, "FORCE_WORDS", ("BYTES", [1], encode_strings([b""]))),
        (
            {"suppress_tokens": [3, 1, 2]},
            "SUPPRESS_TOKENS",
            ("INT32", [3], struct.pack("<3i", 3, 1, 2)),
        ),
    ],
)
def test_options_of_every_kind_are_encoded(
    options: dict[str, Any], name: str, expected: tuple[str, list[int], bytes]
) -> None:
    assert raw_inputs(ask(request_of(**options)))[name] == expected


@pytest.mark.parametrize(
    ("options", "bypass", "wanted"),
    [
        ({}, False, False),
        ({"num_beams": 4}, False, False),
        ({"do_sample": True, "seed": 0}, False, False),
        ({"do_sample": False}, False, False),
        ({"allow_partial": False}, False, False),
        ({"seed": 3}, False, False),
        ({"do_sample": True}, False, True),
        ({"allow_partial": True}, False, True),
        ({"do_sample": True, "seed": 3, "allow_partial": True}, False, True),
        ({"do_sample": True, "seed": 3}, True, True),
        ({}, True, True),
    ],
)
def test_what_must_not_come_from_the_cache_has_a_nonce(
    options: dict[str, Any], bypass: bool, wanted: bool
) -> None:
    request = request_of(**options)
    request.bypass_cache = bypass

    async def run() -> list[tuple[str, list[int], bytes] | None]:
        async with gateway_setup() as setup:
            for _ in range(2):
                await setup.stub.Caption(request, timeout=10)
            return [raw_inputs(asked).get("NONCE") for asked in setup.triton.requests]

    first, second = asyncio.run(run())
    if not wanted:
        assert first is second is None
        return
    assert first is not None
    assert second is not None
    assert first != second
    for datatype, shape, raw in (first, second):
        assert (datatype, shape) == ("INT64", [1])
        assert struct.unpack("<q", raw)[0] >= 0


def test_every_request_has_an_id_of_its_own() -> None:
    async def run() -> list[service_pb2.ModelInferRequest]:
        async with gateway_setup() as setup:
            for _ in range(3):
                await setup.stub.Caption(request_of(), timeout=10)
            return setup.triton.requests

    ids = [request.id for request in asyncio.run(run())]
    assert len(set(ids)) == 3
    assert all(ids)


@pytest.mark.parametrize("for_us", [True, False])
def test_cached_is_what_was_computed_for_another_request(for_us: bool) -> None:
    async def run() -> bool:
        async with gateway_setup() as setup:

            async def answer(
                request: service_pb2.ModelInferRequest, context: object
            ) -> service_pb2.ModelInferResponse:
                outputs = computed_for(request.id if for_us else "another")
                return infer_response(outputs, request_id=request.id)

            setup.triton.answer = answer
            response = await setup.stub.Caption(request_of(), timeout=10)
            return bool(response.cached)

    assert asyncio.run(run()) != for_us


def test_attention_is_cut_to_each_captions_tokens() -> None:
    first, second = answer_to(with_attention()).captions
    assert (first.attention.rows, first.attention.cols) == (1, 2)
    assert list(first.attention.values) == (np.arange(6) / 16).tolist()
    assert list(second.attention.values) == (np.arange(6, 8) / 16).tolist()


def test_attention_that_was_not_asked_for_is_not_there() -> None:
    assert not any(caption.HasField("attention") for caption in answer_to(good_outputs()).captions)


def remembering_a_failure(then: Answer) -> Answer:
    """Triton with a failed answer in its response cache; what is not from there `then` answers."""

    async def answer(
        request: service_pb2.ModelInferRequest, context: Context
    ) -> service_pb2.ModelInferResponse:
        if "NONCE" in raw_inputs(request):
            return await then(request, context)
        return infer_response({}, request_id=request.id)

    return answer


def test_a_failure_that_the_cache_remembers_is_asked_for_anew() -> None:
    async def run() -> tuple[caption_pb2.CaptionResponse, list[service_pb2.ModelInferRequest]]:
        async with gateway_setup() as setup:
            setup.triton.answer = remembering_a_failure(setup.triton.answer_well)
            response = await setup.stub.Caption(request_of(num_beams=4), timeout=10)
            return response, setup.triton.requests

    response, (first, second) = asyncio.run(run())
    assert response.captions[0].text == "a red apple"
    assert first.id != second.id
    again = raw_inputs(second)
    del again["NONCE"]
    assert again == raw_inputs(first)


def test_what_then_goes_wrong_is_what_the_caller_is_told() -> None:
    async def fail(
        request: service_pb2.ModelInferRequest, context: Context
    ) -> service_pb2.ModelInferResponse:
        wire = errors.ImageCorruptError("the image is empty").to_wire()
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, wire)

    def prepare(triton: FakeTriton) -> None:
        triton.answer = remembering_a_failure(fail)

    assert reason_of(failing(prepare)) == "IMAGE_CORRUPT"


@pytest.mark.parametrize(
    ("outputs", "requests"),
    [
        pytest.param({}, 2, id="nothing"),
        pytest.param(without(wire.TEXT), 1, id="not everything"),
    ],
)
def test_only_an_answer_with_nothing_is_asked_for_anew_and_only_once(
    outputs: dict[Any, Any], requests: int
) -> None:
    async def run() -> tuple[Failure, int]:
        async with gateway_setup() as setup:
            setup.triton.answer_with(infer_response(outputs))
            failure = await failure_of(setup.stub, request_of())
            return failure, len(setup.triton.requests)

    failure, asked = asyncio.run(run())
    assert reason_of(failure) == "MODEL_FAULT"
    assert asked == requests
