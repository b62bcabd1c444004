"""A history and stages as the client gives them."""

from __future__ import annotations

from captionserve import BeamFate, BeamPath, Continuation, LikelyToken, Stage
from captionserve._results import from_proto
from captionserve.v1 import caption_pb2


def response() -> caption_pb2.CaptionResponse:
    answer = caption_pb2.CaptionResponse(captions=[caption_pb2.Caption(text="a dog")])
    answer.beams.steps.add(
        parents=[0, 2],
        token_ids=[5, 6],
        token_texts=["a", " dog"],
        token_logprobs=[-0.5, -1.5],
        scores=[-0.5, -2.0],
        # A later server may know more fates.
        fates=[caption_pb2.BEAM_FATE_KEPT, 17],
        beams=[1, -1],
    )
    path = answer.beams.paths.add(continuations=[0])
    path.likeliest.add(token_ids=[5], token_texts=["a"], token_logprobs=[-0.5])
    answer.stages.add(name="encode", milliseconds=2.5)
    return answer


def test_each_continuation_is_a_value() -> None:
    beams = from_proto(response()).beams
    assert beams is not None
    assert beams.steps == (
        (
            Continuation(0, 5, "a", -0.5, -0.5, BeamFate.KEPT, 1),
            Continuation(2, 6, " dog", -1.5, -2.0, BeamFate.UNKNOWN, None),
        ),
    )
    assert beams.paths == (BeamPath((0,), ((LikelyToken(5, "a", -0.5),),)),)


def test_stages_come_in_their_order() -> None:
    assert from_proto(response()).stages == (Stage("encode", 2.5),)


def test_what_was_not_told_is_not_there() -> None:
    result = from_proto(caption_pb2.CaptionResponse(captions=[caption_pb2.Caption(text="a dog")]))
    assert result.beams is None
    assert result.stages == ()
