"""Answers: what callers are sent, in which order, and the room that comes back with the last."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from captionserve_server.core.bundle import Bundle
from captionserve_server.core.captions import CaptionPlan, DecodedCaption
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    ModelFaultError,
    ModelUnavailableError,
    OverloadedError,
)
from captionserve_server.core.history import DROPPED, CaptionHistory, HistoryStep
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.results import CaptionWord, FinishedCaption, Finisher, ReviewReason
from captionserve_server.core.words import WordTokens
from captionserve_server.triton import wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.triton.answered import WAIT_SECONDS, answer_of, error_of, wait_until
from tests.unit.triton.stand_in import InferenceRequest, Logger, outputs_of, request_of

many = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))

ROOM = 2


class PlainFinisher(Finisher):
    """Makes of a caption what can be told apart, without a checkpoint."""

    def __init__(self) -> None:
        # Of a checkpoint only what makes texts is asked.
        super().__init__(cast("Bundle", None), decode)
        self.fails = False

    def finished(self, caption: DecodedCaption, plan: CaptionPlan) -> FinishedCaption:
        if self.fails:
            raise RuntimeError("a secret")
        return finished(caption.token_ids)


class Setup:
    """The thread that answers, with little room."""

    def __init__(self) -> None:
        from captionserve_server.triton.answers import Answering

        self.finisher = PlainFinisher()
        self.died: list[BaseException] = []
        self.answering = Answering(self.finisher, ROOM, self.died.append)

    def accept(
        self,
        *,
        streams: bool = False,
        prefix: tuple[int, ...] = (),
        views: int = 1,
        output_beams: bool = False,
    ) -> tuple[InferenceRequest, Any]:
        """A request that has entered, and its captioning."""
        from captionserve_server.triton.answers import Captioning
        from captionserve_server.triton.callers import Caller

        request = request_of()
        options = DecodingOptions(output_beams=output_beams)
        plan = CaptionPlan(options, WordTokens(prefix))
        self.answering.enter(views)
        updates = self.finisher.updates(plan) if streams else None
        return request, Captioning(self.answering, Caller(request), plan, views, updates)


@pytest.fixture
def setup() -> Iterator[Setup]:
    made = Setup()
    yield made
    made.answering.close(WAIT_SECONDS)
    assert not made.died


def decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token) for token in token_ids)


def decoded(*token_ids: int, history: CaptionHistory | None = None) -> DecodedCaption:
    return DecodedCaption(token_ids, (-0.5,) * len(token_ids), -0.5, "eos", history=history)


@dataclass
class At:
    """How far a caption is."""

    tokens: tuple[int, ...]
    steps: tuple[HistoryStep, ...] = ()

    def certain_tokens(self) -> tuple[int, ...]:
        return self.tokens

    def history(self) -> tuple[HistoryStep, ...]:
        return self.steps


def finished(
    token_ids: tuple[int, ...],
    attention: np.ndarray[Any, Any] | None = None,
    *,
    grounded: bool = False,
    reasons: tuple[ReviewReason, ...] = (),
) -> FinishedCaption:
    """A caption whose every figure follows from its tokens."""
    return FinishedCaption(
        text=decode(token_ids),
        score=-float(sum(token_ids)),
        token_ids=token_ids,
        token_logprobs=tuple(-token / 8 for token in token_ids),
        finish_reason="eos" if len(token_ids) % 2 else "length",
        token_texts=tuple(decode([token]) for token in token_ids),
        confidence=1 / (1 + len(token_ids)),
        degenerate=len(token_ids) % 3 == 0,
        words=tuple(
            CaptionWord(decode([token]), first, 1, token / 32, None)
            for first, token in enumerate(token_ids[::2])
        ),
        token_groundings=tuple(token / 4 for token in token_ids) if grounded else None,
        grounding=0.0 if grounded else None,
        review_reasons=reasons,
        attention=attention,
    )


def parts_of(request: InferenceRequest) -> list[dict[str, Any]]:
    """The responses before the last one."""
    return [outputs_of(each) for each in request.sender.responses[:-1]]


def has_room(setup: Setup) -> bool:
    return setup.answering.unanswered == 0


captions = st.lists(st.lists(st.integers(0, 20), max_size=5).map(tuple), min_size=1, max_size=4)


@many
@given(ids=captions, grids=st.booleans(), grounded=st.booleans(), reasons=st.booleans())
def test_captions_of_any_lengths_can_be_read_from_their_tensors(
    ids: list[tuple[int, ...]], grids: bool, grounded: bool, reasons: bool
) -> None:
    from captionserve_server.triton.answers import caption_tensors

    told = [
        finished(
            each,
            np.full((len(each), 2, 3), row + 1, np.float32) if grids else None,
            grounded=grounded,
            # The first has none.
            reasons=("low_confidence", "degenerate") if reasons and row else (),
        )
        for row, each in enumerate(ids)
    ]
    tensors = caption_tensors(told)
    longest = max(map(len, ids))
    asked_for = {
        wire.ATTENTIONS: grids,
        wire.TOKEN_GROUNDINGS: grounded,
        wire.REVIEW_REASONS: reasons and len(ids) > 1,
    }
    wanted = set(wire.CAPTIONS).difference(wire.WHERE_ASKED_FOR)
    assert set(tensors) == wanted | {spec for spec, is_there in asked_for.items() if is_there}
    for row, caption in enumerate(told):
        length = len(caption.token_ids)
        assert tensors[wire.TEXT][row] == caption.text.encode()
        assert tensors[wire.SCORE][row] == caption.score
        assert tensors[wire.FINISH_REASON][row] == caption.finish_reason.encode()
        assert tensors[wire.CONFIDENCE][row] == caption.confidence
        assert tensors[wire.DEGENERATE][row] == caption.degenerate
        padding = longest - length
        assert tensors[wire.TOKEN_IDS][row].tolist() == [
            *caption.token_ids,
            *[wire.PADDING_TOKEN_ID] * padding,
        ]
        assert tensors[wire.TOKEN_LOGPROBS][row].tolist() == [
            *caption.token_logprobs,
            *[0.0] * padding,
        ]
        assert tensors[wire.TOKEN_TEXTS][row].tolist() == [
            *(text.encode() for text in caption.token_texts),
            *[b""] * padding,
        ]
        most_words = max(len(one.words) for one in told)
        assert tensors[wire.WORD_CONFIDENCES][row].tolist() == [
            *(word.confidence for word in caption.words),
            *[0.0] * (most_words - len(caption.words)),
        ]
        if grounded:
            assert tensors[wire.TOKEN_GROUNDINGS][row].tolist() == [
                *(caption.token_groundings or ()),
                *[0.0] * padding,
            ]
        if wire.REVIEW_REASONS in tensors:
            told_reasons = tensors[wire.REVIEW_REASONS][row].decode().split()
            assert told_reasons == list(caption.review_reasons)
        if grids:
            attentions = tensors[wire.ATTENTIONS][row]
            assert attentions.shape == (longest, 2, 3)
            assert (attentions[:length] == row + 1).all()
            assert not attentions[length:].any()


def test_tensors_have_the_types_that_their_specs_say() -> None:
    from captionserve_server.triton.answers import caption_tensors

    types = {
        "TYPE_STRING": np.object_,
        "TYPE_BOOL": np.bool_,
        "TYPE_INT32": np.int32,
        "TYPE_FP32": np.float32,
        "TYPE_FP64": np.float64,
    }
    grid = np.zeros((2, 2, 2), np.float32)
    told = [finished((1, 2), grid, grounded=True, reasons=("degenerate",))]
    tensors = caption_tensors(told, [((0, 0, 1, 1), told)])
    assert set(tensors) == set(wire.CAPTIONS)
    for spec, array in tensors.items():
        assert array.dtype == types[spec.data_type], spec.name
        assert array.ndim == len(spec.dims), spec.name


def test_an_image_with_parts_takes_the_room_of_each(setup: Setup) -> None:
    with pytest.raises(OverloadedError):
        setup.accept(views=ROOM + 1)
    request, captioning = setup.accept(views=ROOM)
    with pytest.raises(OverloadedError):
        setup.accept()
    captioning.end(CancelledError("the caller has gone"))
    assert error_of(request).reason == "CANCELLED"
    wait_until(lambda: has_room(setup))


def test_captions_of_parts_follow_those_of_the_whole(setup: Setup) -> None:
    request, captioning = setup.accept(views=2)
    captioning.boxes = [(0, 1, 2, 3), (4, 5, 6, 7), (1, 1, 2, 2)]
    captioning.end([[decoded(1), decoded(2)], [decoded(3, 4, 5)], [], [decoded(6)]])
    outputs = outputs_of(answer_of(request))
    assert outputs["TEXT"].tolist() == [b"b", b"c", b"def", b"g"]
    assert outputs["TOKEN_IDS"][2].tolist() == [3, 4, 5]
    assert outputs["REGION_BOXES"].tolist() == [list(box) for box in captioning.boxes]
    assert outputs["REGION_CAPTIONS"].tolist() == [1, 0, 1]


def test_one_more_than_there_is_room_for_is_refused_until_one_is_answered(setup: Setup) -> None:
    first, captioning = setup.accept()
    for _ in range(ROOM - 1):
        setup.accept()
    with pytest.raises(OverloadedError):
        setup.accept()
    assert setup.answering.unanswered == ROOM
    captioning.end([[decoded(1)]])
    answer_of(first)
    wait_until(lambda: setup.answering.unanswered == ROOM - 1)
    setup.accept()


def test_all_captions_of_an_image_are_one_answer(setup: Setup) -> None:
    request, captioning = setup.accept()
    captioning.end([[decoded(1, 2), decoded(3)]])
    assert outputs_of(answer_of(request))["TEXT"].tolist() == [b"bc", b"d"]
    assert len(request.sender.responses) == 1


@many
@given(
    prefix=st.lists(st.integers(0, 20), max_size=3).map(tuple),
    tokens=st.lists(st.integers(0, 20), min_size=1, max_size=8).map(tuple),
    heard=st.lists(st.integers(0, 8), max_size=6).map(sorted),
)
def test_words_heard_at_any_pace_make_the_caption(
    setup: Setup, prefix: tuple[int, ...], tokens: tuple[int, ...], heard: list[int]
) -> None:
    request, captioning = setup.accept(streams=True, prefix=prefix)
    for certain in heard:
        captioning.hear(At(tokens[:certain]))
    captioning.end([[decoded(*tokens)]])
    assert not answer_of(request).has_error()
    parts = parts_of(request)
    news = [part["NEW_TOKEN_IDS"].tolist() for part in parts]
    # The prefix is text that the caller has not seen, but no tokens that were generated.
    assert tuple(itertools.chain(*news)) == tokens
    assert all(news)
    assert b"".join(part["NEW_TEXT"][0] for part in parts).decode() == decode((*prefix, *tokens))
    assert len(parts) == len({len(tokens[:certain]) for certain in [*heard, len(tokens)]} - {0})


class NotToBeAsked:
    """Progress that nobody wants to know of."""

    def certain_tokens(self) -> tuple[int, ...]:
        raise AssertionError("words were asked for")

    def history(self) -> tuple[HistoryStep, ...]:
        raise AssertionError("a history was asked for")


def step_of(*tokens: int) -> HistoryStep:
    """A step of as many continuations of a first row, the first of which is kept."""
    count = len(tokens)
    rows = np.array([0, *[DROPPED] * (count - 1)], np.int64)
    return HistoryStep(
        parents=np.zeros(count, np.int64),
        tokens=np.array(tokens, np.int64),
        logprobs=np.full(count, -0.5, np.float32),
        scores=np.full(count, -0.5, np.float32),
        rows=rows,
        origins=np.zeros(1, np.int64),
        likeliest_tokens=np.array([tokens], np.int64),
        likeliest_logprobs=np.full((1, count), -0.5, np.float32),
    )


@many
@given(
    searched=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), min_size=1, max_size=6),
    heard=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6),
)
def test_steps_heard_at_any_pace_are_those_of_the_answer(
    setup: Setup, searched: list[list[int]], heard: list[tuple[int, int]]
) -> None:
    steps = tuple(step_of(*each) for each in searched)
    tokens = tuple(each[0] for each in searched)
    caption = decoded(*tokens, history=CaptionHistory(steps, (0,) * len(steps)))
    request, captioning = setup.accept(streams=True, output_beams=True)
    for certain, considered in zip(*map(sorted, zip(*heard, strict=True)), strict=True):
        captioning.hear(At(tokens[:certain], steps[:considered]))
    captioning.end([[caption]])
    final = json.loads(outputs_of(answer_of(request))["BEAMS"][0])["steps"]
    parts = parts_of(request)
    told = [json.loads(part["NEW_BEAM_STEPS"][0]) for part in parts if "NEW_BEAM_STEPS" in part]
    assert list(itertools.chain(*told)) == final
    assert [each["token_ids"] for each in final] == searched
    # The tensor is there only with something in it.
    assert all(told)
    assert all(part["NEW_TEXT"].shape == (1,) for part in parts)


def test_who_does_not_stream_is_told_nothing_and_costs_no_search_of_it(setup: Setup) -> None:
    request, captioning = setup.accept(output_beams=True)
    captioning.hear(NotToBeAsked())
    captioning.end([[decoded(1)]])
    answer_of(request)
    assert parts_of(request) == []


def test_an_error_ends_a_stream_without_more_words(setup: Setup) -> None:
    request, captioning = setup.accept(streams=True)
    captioning.hear(At((1,)))
    captioning.end(CancelledError("the caller has gone"))
    assert error_of(request).reason == "CANCELLED"
    assert len(parts_of(request)) == 1


def test_a_failure_of_ours_is_told_and_any_other_is_a_fault(setup: Setup) -> None:
    request, captioning = setup.accept()
    captioning.fail(ModelUnavailableError("shutting down"))
    assert error_of(request).message == "shutting down"
    assert not Logger.lines
    request, captioning = setup.accept()
    captioning.fail(KeyError("a secret"))
    error = error_of(request)
    assert type(error) is ModelFaultError
    assert "secret" not in error.message
    assert Logger.lines == ["a request failed: KeyError: 'a secret'"]


def test_a_caption_that_cannot_be_told_is_a_fault_and_its_room_comes_back(setup: Setup) -> None:
    setup.finisher.fails = True
    request, captioning = setup.accept()
    captioning.end([[decoded(1)]])
    assert error_of(request).reason == "MODEL_FAULT"
    wait_until(lambda: has_room(setup))
    setup.finisher.fails = False
    request, captioning = setup.accept()
    captioning.end([[decoded(1)]])
    assert not answer_of(request).has_error()


@pytest.mark.parametrize("answer", [[[decoded(1)]], OverloadedError("no room")])
def test_an_answer_that_cannot_be_sent_gives_its_room_back(
    setup: Setup, answer: list[list[DecodedCaption]] | CaptionServeError
) -> None:
    lost, captioning = setup.accept(streams=True)
    lost.sender.fails = True
    captioning.hear(At((1,)))
    captioning.end(answer)
    wait_until(lambda: has_room(setup))
    assert lost.sender.final.is_set()
    line = "an answer could not be sent: RuntimeError: the response cannot be sent"
    wait_until(lambda: Logger.lines == [line] * 2)
    request, captioning = setup.accept()
    captioning.end([[decoded(1)]])
    assert not answer_of(request).has_error()


def test_what_is_to_be_sent_at_closing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()

    def finished_while_closing(caption: DecodedCaption, plan: CaptionPlan) -> FinishedCaption:
        wait_until(lambda: setup.answering._thread._closed)
        return finished(caption.token_ids)

    monkeypatch.setattr(setup.finisher, "finished", finished_while_closing)
    accepted = [setup.accept() for _ in range(ROOM)]
    for _, captioning in accepted:
        captioning.end([[decoded(1)]])
    setup.answering.close(WAIT_SECONDS)
    for request, _ in accepted:
        assert request.sender.final.is_set()
        assert not answer_of(request).has_error()
    assert has_room(setup)


def test_the_engine_sees_of_a_captioning_what_its_caller_is(setup: Setup) -> None:
    _, captioning = setup.accept()
    assert not captioning.has_gone
    captioning.caller.has_gone, captioning.caller.deadline = True, 5.0
    assert captioning.has_gone
    assert captioning.deadline == 5.0
