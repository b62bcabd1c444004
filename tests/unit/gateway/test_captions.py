"""What the gateway asks of Triton, and what it makes of the answer."""

from __future__ import annotations

import asyncio
import struct

import grpc
import numpy as np
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.gateway.kserve import encode_strings
from captionserve_server.triton import wire
from captionserve_server.triton.wire import TensorSpec
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from tests.unit.gateway.fake_triton import good_outputs, infer_response
from tests.unit.gateway.harness import IMAGE, gateway_setup, request_of


def ask(request: caption_pb2.CaptionRequest) -> service_pb2.ModelInferRequest:
    """What Triton is asked for a caller's request."""

    async def run() -> service_pb2.ModelInferRequest:
        async with gateway_setup() as setup:
            await setup.stub.Caption(request, timeout=10)
            return setup.triton.requests[0]

    return asyncio.run(run())


def raw_inputs(request: service_pb2.ModelInferRequest) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        tensor.name: (tensor.datatype, list(tensor.shape), raw)
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    }


def answer_to(
    outputs: dict[TensorSpec, bytes | NDArray[np.generic]],
) -> caption_pb2.CaptionResponse:
    """What a caller is told when Triton answers with these outputs."""

    async def run() -> caption_pb2.CaptionResponse:
        async with gateway_setup() as setup:
            setup.triton.answer_with(infer_response(outputs))
            answer: caption_pb2.CaptionResponse = await setup.stub.Caption(request_of(), timeout=10)
            return answer

    return asyncio.run(run())


def test_captions_come_back_whole() -> None:
    expected = caption_pb2.CaptionResponse(
        captions=[
            caption_pb2.Caption(
                text="a red apple",
                score=-0.5,
                token_ids=[5, 6, 2],
                token_logprobs=[-0.25, -0.25, -0.5],
                finish_reason=caption_pb2.FINISH_REASON_EOS,
                token_texts=["a red", " apple", ""],
                confidence=0.75,
            ),
            caption_pb2.Caption(
                text="un caf\N{LATIN SMALL LETTER E WITH ACUTE}",
                score=-0.75,
                # Token 0 is a token; only the padding is left out.
                token_ids=[0],
                token_logprobs=[-0.75],
                finish_reason=caption_pb2.FINISH_REASON_LENGTH,
                token_texts=["un caf\N{LATIN SMALL LETTER E WITH ACUTE}"],
                confidence=0.5,
                degenerate=True,
            ),
        ],
        model_version=3,
        cached=True,
    )
    assert answer_to(good_outputs()) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"eos", caption_pb2.FINISH_REASON_EOS),
        (b"length", caption_pb2.FINISH_REASON_LENGTH),
        (b"deadline", caption_pb2.FINISH_REASON_DEADLINE),
    ],
)
def test_each_finish_reason_has_its_value(text: bytes, expected: int) -> None:
    outputs = good_outputs() | {wire.FINISH_REASON: encode_strings([b"eos", text])}
    response = answer_to(outputs)
    assert [caption.finish_reason for caption in response.captions] == [
        caption_pb2.FINISH_REASON_EOS,
        expected,
    ]


def test_a_caption_without_tokens_is_a_caption() -> None:
    """The deadline may come before the first token of a partial caption."""
    outputs: dict[TensorSpec, bytes | NDArray[np.generic]] = {
        wire.TEXT: encode_strings([b"a red"]),
        wire.SCORE: np.zeros(1, "<f8"),
        wire.FINISH_REASON: encode_strings([b"deadline"]),
        wire.CONFIDENCE: np.zeros(1, "<f8"),
        wire.DEGENERATE: np.array([True]),
        wire.TOKEN_IDS: np.zeros((1, 0), "<i4"),
        wire.TOKEN_LOGPROBS: np.zeros((1, 0), "<f4"),
        wire.TOKEN_TEXTS: np.zeros((1, 0), np.object_),
        wire.ATTENTIONS: np.zeros((1, 0, 2, 3), "<f4"),
        wire.COMPUTED_FOR: encode_strings([b"another"]),
    }
    (caption,) = answer_to(outputs).captions
    assert caption == caption_pb2.Caption(
        text="a red",
        finish_reason=caption_pb2.FINISH_REASON_DEADLINE,
        degenerate=True,
        attention=caption_pb2.Attention(rows=2, cols=3),
    )


def test_an_image_alone_is_sent_alone() -> None:
    asked = ask(request_of())
    assert asked.model_name == wire.CAPTIONER.name
    encoded = struct.pack("<I", len(IMAGE)) + IMAGE
    assert raw_inputs(asked) == {"IMAGE": ("BYTES", [1], encoded)}


def test_the_options_that_are_set_are_sent() -> None:
    asked = ask(
        request_of(
            num_beams=4,
            max_length=20,
            length_penalty=0.0,
            early_stopping=caption_pb2.EARLY_STOPPING_NEVER,
            num_return_sequences=2,
        )
    )
    sent = raw_inputs(asked)
    del sent["IMAGE"]
    assert sent == {
        "NUM_BEAMS": ("INT32", [1], struct.pack("<i", 4)),
        "MAX_LENGTH": ("INT32", [1], struct.pack("<i", 20)),
        "LENGTH_PENALTY": ("FP64", [1], struct.pack("<d", 0.0)),
        "EARLY_STOPPING": ("BYTES", [1], struct.pack("<I", 5) + b"never"),
        "NUM_RETURN_SEQUENCES": ("INT32", [1], struct.pack("<i", 2)),
    }


def test_an_unset_option_is_not_sent() -> None:
    assert set(raw_inputs(ask(request_of(num_beams=-1)))) == {"IMAGE", "NUM_BEAMS"}


def test_an_empty_image_is_for_the_model_to_refuse() -> None:
    assert raw_inputs(ask(request_of(b"")))["IMAGE"] == ("BYTES", [1], bytes(4))


def test_a_large_image_passes() -> None:
    async def run() -> int:
        async with gateway_setup() as setup:
            await setup.stub.Caption(request_of(bytes(20_000_000)), timeout=30)
            return len(setup.triton.requests[0].raw_input_contents[0])

    assert asyncio.run(run()) == 20_000_004


@pytest.mark.parametrize(
    ("timeout", "cap", "most"), [(10.0, 40.0, 10.0), (40.0, 10.0, 10.0), (None, 10.0, 10.0)]
)
def test_triton_is_told_the_time_that_is_left(
    timeout: float | None, cap: float, most: float
) -> None:
    async def run() -> tuple[float | None, int]:
        async with gateway_setup(deadline_cap_seconds=cap) as setup:
            await setup.stub.Caption(request_of(), timeout=timeout)
            (seconds_left,) = setup.triton.seconds_left
            (asked,) = setup.triton.requests
            return seconds_left, asked.parameters["timeout"].int64_param

    seconds_left, microseconds = asyncio.run(run())
    # gRPC rounds what it sends up.
    assert seconds_left is not None
    assert 0 < seconds_left <= most + 1
    assert 0 < microseconds <= (most + 1) * 1e6


def test_a_message_over_the_limit_is_grpcs_own_error() -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup(max_message_bytes=1000) as setup:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await setup.stub.Caption(request_of(bytes(2000)), timeout=10)
            assert setup.triton.requests == []
            return raised.value.code()

    assert asyncio.run(run()) is grpc.StatusCode.RESOURCE_EXHAUSTED
