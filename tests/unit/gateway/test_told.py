"""What callers are told of a search and of time, where they ask for it, and only there."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from captionserve.v1 import caption_pb2
from captionserve_server.core.beams import BeamHistory, BeamPath, Continuation, LikelyToken
from captionserve_server.gateway.kserve import encode_strings
from captionserve_server.gateway.stages import STAGES
from captionserve_server.triton import wire

from tests.unit.gateway.fake_triton import good_outputs, infer_response
from tests.unit.gateway.harness import gateway_setup, request_of

BEAMS = BeamHistory(
    steps=(
        (
            Continuation(0, 5, "a red", -0.25, -0.25, "kept", 1),
            Continuation(0, 0, "un café", -0.75, -0.75, "finished", None),
            Continuation(0, 9, "", -2.5, -2.5, "dropped", None),
        ),
        (Continuation(1, 6, " apple", -0.5, -0.75, "kept", 0),),
        (Continuation(0, 2, "", -0.125, -0.875, "finished", None),),
    ),
    paths=(
        BeamPath((0, 0, 0), ((LikelyToken(5, "a red", -0.25),), (), (LikelyToken(2, "", -0.125),))),
        BeamPath((1,), ((LikelyToken(5, "a red", -0.25), LikelyToken(0, "un café", -0.75)),)),
    ),
)


def test_a_history_is_told_field_by_field() -> None:
    async def run() -> caption_pb2.CaptionResponse:
        async with gateway_setup() as setup:
            text = encode_strings([wire.beams_text(BEAMS).encode()])
            setup.triton.answer_with(infer_response({**good_outputs(), wire.BEAMS: text}))
            answer: caption_pb2.CaptionResponse = await setup.stub.Caption(
                request_of(output_beams=True), timeout=10
            )
            return answer

    beams = asyncio.run(run()).beams
    kept, dropped, finished = (
        caption_pb2.BEAM_FATE_KEPT,
        caption_pb2.BEAM_FATE_DROPPED,
        caption_pb2.BEAM_FATE_FINISHED,
    )
    first = beams.steps[0]
    assert list(first.parents) == [0, 0, 0]
    assert list(first.token_ids) == [5, 0, 9]
    assert list(first.token_texts) == ["a red", "un café", ""]
    assert list(first.token_logprobs) == list(first.scores) == [-0.25, -0.75, -2.5]
    assert list(first.fates) == [kept, finished, dropped]
    assert list(first.beams) == [1, -1, -1]
    assert [list(path.continuations) for path in beams.paths] == [[0, 0, 0], [1]]
    assert [list(each.token_ids) for each in beams.paths[0].likeliest] == [[5], [], [2]]
    assert list(beams.paths[1].likeliest[0].token_texts) == ["a red", "un café"]


def test_without_a_history_none_is_told() -> None:
    async def run() -> caption_pb2.CaptionResponse:
        async with gateway_setup() as setup:
            setup.triton.answer_with(infer_response(good_outputs()))
            answer: caption_pb2.CaptionResponse = await setup.stub.Caption(request_of(), timeout=10)
            return answer

    assert not asyncio.run(run()).HasField("beams")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"steps": []}',
        '{"steps": [{"fates": ["lost"]}], "paths": []}',
        '{"steps": [{"more": [1], "fates": []}], "paths": []}',
        json.dumps({"steps": 3, "paths": []}),
        json.dumps([]),
    ],
)
def test_a_history_that_cannot_be_read_is_the_models_fault(text: str) -> None:
    async def run() -> None:
        async with gateway_setup() as setup:
            outputs = {**good_outputs(), wire.BEAMS: encode_strings([text.encode()])}
            setup.triton.answer_with(infer_response(outputs))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await setup.stub.Caption(request_of(output_beams=True), timeout=10)
            assert caught.value.code() is grpc.StatusCode.INTERNAL

    asyncio.run(run())


def ask_each(*calls: dict[str, Any]) -> list[caption_pb2.CaptionResponse]:
    """The answers to calls one after the other, and how often the model was asked."""

    async def run() -> list[caption_pb2.CaptionResponse]:
        async with gateway_setup() as setup:
            setup.triton.answer_with(infer_response(good_outputs()))
            return [await setup.stub.Caption(request_of(**call), timeout=10) for call in calls]

    return asyncio.run(run())


def test_stages_are_told_in_their_order_where_they_are_asked_for() -> None:
    told, untold = ask_each({"output_stages": True}, {"num_beams": 2})
    assert [stage.name for stage in told.stages] == list(STAGES)
    assert all(stage.milliseconds >= 0 for stage in told.stages)
    # The fake's stages take a millisecond each.
    assert [stage.milliseconds for stage in told.stages[1:]] == pytest.approx([1.0] * 8)
    assert not untold.stages


def test_an_answer_from_memory_has_no_stages_and_says_that_it_is_remembered() -> None:
    first, again, plain = ask_each({"output_stages": True}, {"output_stages": True}, {})
    assert (bool(first.stages), first.cached) == (True, False)
    assert (bool(again.stages), again.cached) == (False, True)
    # Who does not ask for stages is given the same answer.
    assert (bool(plain.stages), plain.cached) == (False, True)
    assert plain.captions == first.captions
