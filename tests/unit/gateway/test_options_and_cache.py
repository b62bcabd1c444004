"""How options of every kind reach Triton, and what may come from its response cache."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import numpy as np
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core import tensors
from captionserve_server.gateway.kserve import encode_strings
from tritonclient.grpc import service_pb2

from tests.unit.gateway.fake_triton import good_outputs, infer_response, with_attention
from tests.unit.gateway.harness import gateway_setup, request_of
from tests.unit.gateway.test_captions import ask, raw_inputs


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ({"do_sample": True}, "DO_SAMPLE", ("BOOL", [1], b"\x01")),
        ({"do_sample": False}, "DO_SAMPLE", ("BOOL", [1], b"\x00")),
        ({"seed": 2**62 + 1}, "SEED", ("INT64", [1], struct.pack("<q", 2**62 + 1))),
        ({"prefix": ""}, "PREFIX", ("BYTES", [1], encode_strings([b""]))),
        (
            {"bad_words": ["a cat", "caf\u00e9"]},
            "BAD_WORDS",
            ("BYTES", [2], encode_strings([b"a cat", b"caf\xc3\xa9"])),
        ),
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
        ({"do_sample": True}, False, True),
        ({"allow_partial": True}, False, True),
        ({}, True, True),
    ],
)
def test_what_must_not_come_from_the_cache_has_a_nonce(
    options: dict[str, Any], bypass: bool, wanted: bool
) -> None:
    request = request_of(**options)
    request.bypass_cache = bypass
    first, second = (raw_inputs(ask(request)).get("NONCE") for _ in range(2))
    assert (first is not None) == wanted
    if wanted:
        assert first != second


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
                computed_for = request.id if for_us else "another"
                outputs = good_outputs() | {
                    tensors.COMPUTED_FOR: encode_strings([computed_for.encode()])
                }
                return infer_response(outputs, request_id=request.id)

            setup.triton.answer = answer
            response = await setup.stub.Caption(request_of(), timeout=10)
            return bool(response.cached)

    assert asyncio.run(run()) != for_us


def test_attention_is_cut_to_each_captions_tokens() -> None:
    async def run() -> caption_pb2.CaptionResponse:
        async with gateway_setup() as setup:
            setup.triton.answer_with(infer_response(with_attention()))
            response: caption_pb2.CaptionResponse = await setup.stub.Caption(
                request_of(output_attentions=True), timeout=10
            )
            return response

    first, second = asyncio.run(run()).captions
    assert (first.attention.rows, first.attention.cols) == (1, 2)
    assert list(first.attention.values) == (np.arange(6) / 16).tolist()
    assert list(second.attention.values) == (np.arange(6, 8) / 16).tolist()


@pytest.mark.parametrize(
    ("timeout", "least", "most"), [(0.4, 0.05, 0.05), (2.0, 0.1, 0.2), (30.0, 0.5, 0.5)]
)
def test_partial_captions_are_asked_for_before_the_deadline(
    timeout: float, least: float, most: float
) -> None:
    async def run() -> tuple[float, float]:
        async with gateway_setup() as setup:
            await setup.stub.Caption(request_of(allow_partial=True), timeout=timeout)
            (seconds,), (asked,) = setup.triton.seconds_left, setup.triton.requests
            assert seconds is not None
            return seconds, asked.parameters["timeout"].int64_param / 1e6

    call_seconds, model_seconds = asyncio.run(run())
    assert model_seconds >= 0.001
    # The call's own time has run on between the two readings, and gRPC rounds it up.
    assert model_seconds <= timeout - least
    assert call_seconds > model_seconds
    assert model_seconds >= min(timeout, call_seconds) - most - 0.3
