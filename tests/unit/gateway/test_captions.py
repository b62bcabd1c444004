"""What the gateway asks of Triton, and what it makes of the answer."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any

import grpc
import numpy as np
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core.framing import MAX_REGIONS, RESIZES
from captionserve_server.gateway.conversion import ENUM_OPTIONS
from captionserve_server.gateway.kserve import decode_strings, encode_strings
from captionserve_server.triton import wire
from captionserve_server.triton.wire import TensorSpec
from google.rpc import error_details_pb2
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from tests.unit.gateway.fake_triton import (
    good_outputs,
    infer_response,
    with_attention,
    with_grounding,
    with_region,
)
from tests.unit.gateway.harness import IMAGE, detail_of, gateway_setup, request_of


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
                words=[
                    caption_pb2.Word(text="a", first_token=0, tokens=1, confidence=0.875),
                    caption_pb2.Word(text="red", first_token=0, tokens=1, confidence=0.75),
                    caption_pb2.Word(text="apple", first_token=1, tokens=1, confidence=0.5),
                ],
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
                words=[
                    caption_pb2.Word(text="un", first_token=0, tokens=1, confidence=0.25),
                    caption_pb2.Word(
                        text="caf\N{LATIN SMALL LETTER E WITH ACUTE}",
                        first_token=0,
                        tokens=1,
                        confidence=0.125,
                    ),
                ],
            ),
        ],
        model_version=3,
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
        wire.WORD_CONFIDENCES: np.zeros((1, 0), "<f8"),
        wire.ATTENTIONS: np.zeros((1, 0, 2, 3), "<f4"),
        wire.TIMES: good_outputs()[wire.TIMES],
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
    assert asked.model_name == wire.DECODER.name
    encoded = struct.pack("<I", len(IMAGE)) + IMAGE
    assert raw_inputs(asked) == {"IMAGE": ("BYTES", [1], encoded)}


def options_sent(**options: Any) -> Any:
    """The JSON that the decoder is sent for options; None if it is sent none."""
    sent = raw_inputs(ask(request_of(**options))).get("OPTIONS")
    if sent is None:
        return None
    datatype, shape, raw = sent
    assert (datatype, shape) == ("BYTES", [1])
    (text,) = decode_strings(raw)
    return json.loads(text)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_beams": 4, "length_penalty": 0.0}, {"num_beams": 4, "length_penalty": 0.0}),
        ({"early_stopping": caption_pb2.EARLY_STOPPING_NEVER}, {"early_stopping": "never"}),
        ({"early_stopping": caption_pb2.EARLY_STOPPING_TRUE}, {"early_stopping": True}),
        ({"early_stopping": caption_pb2.EARLY_STOPPING_FALSE}, {"early_stopping": False}),
        (
            {"num_beams": 2, "rerank": caption_pb2.RERANK_GROUNDING},
            {"num_beams": 2, "rerank": "grounding"},
        ),
        ({"min_confidence": 0.5}, {"min_confidence": 0.5}),
        ({"do_sample": False}, {"do_sample": False}),
        ({"do_sample": True, "seed": 2**62 + 1}, {"do_sample": True, "seed": 2**62 + 1}),
        ({"prefix": ""}, {"prefix": ""}),
        ({"bad_words": {"values": ["a cat", "caf\u00e9"]}}, {"bad_words": ["a cat", "caf\u00e9"]}),
        ({"bad_words": {}}, {"bad_words": []}),
        ({"suppress_tokens": {"values": [3, 1, 2]}}, {"suppress_tokens": [3, 1, 2]}),
        ({}, None),
    ],
)
def test_the_options_that_are_set_are_sent(given: dict[str, Any], expected: Any) -> None:
    assert options_sent(**given) == expected


def test_every_value_of_an_enum_has_its_json() -> None:
    assert ENUM_OPTIONS == {
        "early_stopping": {
            caption_pb2.EARLY_STOPPING_FALSE: False,
            caption_pb2.EARLY_STOPPING_TRUE: True,
            caption_pb2.EARLY_STOPPING_NEVER: "never",
        },
        "rerank": {
            caption_pb2.RERANK_LIKELIHOOD: "likelihood",
            caption_pb2.RERANK_GROUNDING: "grounding",
        },
    }


def test_every_token_word_and_caption_has_its_grounding() -> None:
    first, second = answer_to(with_grounding()).captions
    assert list(first.token_groundings) == [2.0, 4.0, 0.0]
    assert first.grounding == 2.0
    # "a" and "red" are of the same token.
    assert [word.grounding for word in first.words] == [2.0, 2.0, 4.0]
    assert list(second.token_groundings) == [-1.0]
    assert second.grounding == -1.0
    for caption in answer_to(good_outputs()).captions:
        assert not caption.HasField("grounding")
        assert not any(word.HasField("grounding") for word in caption.words)


def test_reasons_to_look_at_a_caption_are_its_own() -> None:
    first, second = answer_to(with_grounding()).captions
    assert not first.needs_review
    assert not first.review_reasons
    assert second.needs_review
    assert list(second.review_reasons) == [
        caption_pb2.REVIEW_REASON_LOW_CONFIDENCE,
        caption_pb2.REVIEW_REASON_NOT_GROUNDED,
    ]


def test_pixel_values_are_sent_as_they_are() -> None:
    values = struct.pack("<6f", *range(6))
    request = caption_pb2.CaptionRequest()
    request.image.pixel_values.height, request.image.pixel_values.width = 1, 2
    request.image.pixel_values.values = values
    assert raw_inputs(ask(request)) == {"PIXEL_VALUES": ("FP32", [3, 1, 2], values)}


def framed(**framing: Any) -> caption_pb2.CaptionRequest:
    request = request_of()
    request.MergeFrom(caption_pb2.CaptionRequest(**framing))
    return request


def region(*corners: int) -> caption_pb2.Region:
    return caption_pb2.Region(**dict(zip(("left", "top", "right", "bottom"), corners, strict=True)))


def test_what_is_asked_of_the_image_is_sent() -> None:
    request = framed(
        regions=[region(1, 2, 3, 4), region(5, 6, 7, 8)],
        tiles=caption_pb2.Tiles(rows=2, cols=3),
        resize=caption_pb2.RESIZE_LETTERBOX,
    )
    sent = raw_inputs(ask(request))
    assert sent["REGIONS"] == ("INT32", [2, 4], struct.pack("<8i", *range(1, 9)))
    assert sent["TILES"] == ("INT32", [2], struct.pack("<2i", 2, 3))
    assert sent["RESIZE"] == ("BYTES", [1], encode_strings([b"letterbox"]))


def test_every_way_of_resizing_has_its_name_and_the_checkpoints_is_not_sent() -> None:
    resizes = set(caption_pb2.Resize.values())
    sent = {each: raw_inputs(ask(framed(resize=each))).get("RESIZE") for each in resizes}
    assert sent.pop(caption_pb2.RESIZE_UNSPECIFIED) is None
    assert sent.pop(caption_pb2.RESIZE_CHECKPOINT) is None
    names = [decode_strings(resize[2])[0].decode() for resize in sent.values() if resize]
    assert sorted(names) == sorted(set(RESIZES) - {"checkpoint"})


@pytest.mark.parametrize(
    ("framing", "fields"),
    [
        ({"regions": [region(0, 0, 1, 1), region(3, 0, 3, 1)]}, {"regions[1]"}),
        ({"regions": [region(-1, 0, 3, 1)]}, {"regions[0]"}),
        ({"regions": [region(0, 0, 1, 1)] * (MAX_REGIONS + 1)}, {"regions"}),
        ({"tiles": caption_pb2.Tiles(rows=2)}, {"tiles"}),
        ({"tiles": caption_pb2.Tiles()}, {"tiles"}),
        ({"tiles": caption_pb2.Tiles(rows=5, cols=5)}, {"tiles"}),
        ({"resize": 99}, {"resize"}),
    ],
)
def test_what_no_image_has_is_refused_by_field_before_the_model_is_asked(
    framing: dict[str, Any], fields: set[str]
) -> None:
    assert refusal(framed(**framing)) == fields


@pytest.mark.parametrize(
    ("framing", "fields"),
    [
        ({"regions": [region(0, 0, 1, 1)]}, {"regions"}),
        ({"tiles": caption_pb2.Tiles(rows=1, cols=1)}, {"tiles"}),
        ({"resize": caption_pb2.RESIZE_CENTER_CROP}, {"resize"}),
    ],
)
def test_pixel_values_have_no_parts_and_one_size(framing: dict[str, Any], fields: set[str]) -> None:
    request = caption_pb2.CaptionRequest(**framing)
    values = struct.pack("<6f", *range(6))
    request.image.pixel_values.MergeFrom(caption_pb2.PixelValues(height=1, width=2, values=values))
    assert refusal(request) == fields


def refusal(request: caption_pb2.CaptionRequest) -> set[str]:
    """The fields with which a request is refused, by the gateway alone."""

    async def run() -> grpc.aio.AioRpcError:
        async with gateway_setup() as setup:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await setup.stub.Caption(request, timeout=10)
            assert setup.triton.requests == []
            return raised.value

    error = asyncio.run(run())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail_of(error, error_details_pb2.ErrorInfo()).reason == "INVALID_FRAMING"
    violations = detail_of(error, error_details_pb2.BadRequest()).field_violations
    return {violation.field for violation in violations}


def test_captions_of_parts_come_back_with_where_they_are() -> None:
    whole, second = answer_to(good_outputs()).captions
    answer = answer_to(with_region())
    assert list(answer.captions) == [whole]
    assert list(answer.regions) == [
        caption_pb2.DescribedRegion(region=region(1, 2, 30, 40), captions=[second])
    ]
    without = with_region() | {
        wire.REGION_BOXES: np.array([[1, 2, 3, 4], [0, 0, 1, 1]], "<i4"),
        wire.REGION_CAPTIONS: np.array([0, 1], "<i4"),
    }
    assert [len(each.captions) for each in answer_to(without).regions] == [0, 1]


def test_attention_is_cut_to_each_captions_tokens() -> None:
    first, second = answer_to(with_attention()).captions
    assert (first.attention.rows, first.attention.cols) == (1, 2)
    assert list(first.attention.values) == (np.arange(6) / 16).tolist()
    assert list(second.attention.values) == (np.arange(6, 8) / 16).tolist()


def test_attention_that_was_not_asked_for_is_not_there() -> None:
    assert not any(caption.HasField("attention") for caption in answer_to(good_outputs()).captions)


def test_every_request_has_an_id_of_its_own() -> None:
    async def run() -> list[service_pb2.ModelInferRequest]:
        async with gateway_setup() as setup:
            for number in range(3):
                await setup.stub.Caption(request_of(bytes([number])), timeout=10)
            return setup.triton.requests

    ids = [request.id for request in asyncio.run(run())]
    assert len(set(ids)) == 3
    assert all(ids)


def test_an_empty_image_is_for_the_model_to_refuse() -> None:
    assert raw_inputs(ask(request_of(b"")))["IMAGE"] == ("BYTES", [1], bytes(4))


def test_a_large_image_passes() -> None:
    async def run() -> int:
        async with gateway_setup() as setup:
            await setup.stub.Caption(request_of(bytes(20_000_000)), timeout=30)
            return len(setup.triton.requests[0].raw_input_contents[0])

    assert asyncio.run(run()) == 20_000_004


def test_a_message_over_the_limit_is_grpcs_own_error() -> None:
    async def run() -> grpc.StatusCode:
        async with gateway_setup(max_message_megabytes=1) as setup:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await setup.stub.Caption(request_of(bytes(2**20)), timeout=10)
            assert setup.triton.requests == []
            return raised.value.code()

    assert asyncio.run(run()) is grpc.StatusCode.RESOURCE_EXHAUSTED
