"""What all models share of Triton's side: inputs, answers, errors, and calls of other models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from captionserve_server.core.errors import (
    CancelledError,
    CaptionServeError,
    DeadlineExceededError,
    InvalidFramingError,
    InvalidOptionsError,
    InvalidRequestError,
    ModelFaultError,
    ModelNotFoundError,
    ModelUnavailableError,
    OverloadedError,
    UnauthenticatedError,
    all_error_types,
)
from captionserve_server.triton import wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.triton.answered import error_in
from tests.unit.triton.stand_in import (
    InferenceRequest,
    InferenceResponse,
    Logger,
    Tensor,
    TritonError,
    outputs_of,
    request_of,
)

many = settings(deadline=None, suppress_health_check=list(HealthCheck))

TYPES = all_error_types()


def made(error_type: type[CaptionServeError], text: str, field: str) -> CaptionServeError:
    if issubclass(error_type, (InvalidFramingError, InvalidOptionsError)):
        return error_type({field: text})
    return error_type(text)


errors = st.builds(made, st.sampled_from(TYPES), st.text(), st.text())


def arguments(**parameters: str) -> dict[str, str]:
    strings = {name: {"string_value": value} for name, value in parameters.items()}
    config = {"parameters": strings, "name": "decoder"}
    return {
        "model_config": json.dumps(config),
        "model_name": "decoder",
        "model_repository": "repository/decoder",
        "model_version": "3",
    }


def error_answer(text: str) -> InferenceResponse:
    return InferenceResponse(error=TritonError(text, TritonError.INTERNAL))


def words(text: str, tokens: int) -> InferenceResponse:
    ids = np.arange(tokens, dtype=np.int32)
    text_tensor = Tensor("NEW_TEXT", np.array([text.encode()], np.object_))
    return InferenceResponse([text_tensor, Tensor("NEW_TOKEN_IDS", ids)])


def answers_with(name: str, answers: Iterable[InferenceResponse]) -> list[InferenceRequest]:
    """Have a model answer so; the list gets what it is asked."""
    asked: list[InferenceRequest] = []

    def answer(request: InferenceRequest) -> Iterator[InferenceResponse]:
        asked.append(request)
        yield from answers

    InferenceRequest.models[name] = answer
    return asked


def encode(pixels: np.ndarray[Any, Any]) -> Any:
    from captionserve_server.triton.pb import call_model

    return call_model(wire.VISION_ENCODER, 2, {wire.PIXELS: pixels}, wire.ENCODER_STATES)


def decode(**named: Any) -> Iterator[dict[wire.TensorSpec, Any]]:
    from captionserve_server.triton.pb import call_decoupled, text_array

    inputs = {wire.IMAGE: text_array(b"an image")}
    return call_decoupled(wire.DECODER, 2, inputs, wire.PART, **named)


def test_arguments_are_what_triton_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from captionserve_server.triton import pb
    from captionserve_server.triton.pb import ModelArguments

    monkeypatch.setattr(pb, "threads_of_graphs", lambda: 7)
    read = ModelArguments(arguments(slots="12", few="2", all="0"))
    assert read.repository == "repository/decoder"
    assert read.version == 3
    assert read.config["name"] == "decoder"
    assert read.number("slots") == 12
    assert read.threads("few") == 2
    assert read.threads("all") == 7


def test_inputs_are_read_and_those_left_out_are_none() -> None:
    from captionserve_server.triton.pb import read, read_bytes, read_flag

    regions = np.arange(8, dtype=np.int32).reshape(2, 4)
    given = request_of(IMAGE=b"\xff\x00", REGIONS=regions, STREAM=True, DESCRIBE=False)
    assert read_bytes(given, wire.IMAGE) == b"\xff\x00"
    assert read(given, wire.REGIONS) is regions
    assert read_flag(given, wire.STREAM)
    assert not read_flag(given, wire.DESCRIBE)
    nothing = request_of()
    assert read_bytes(nothing, wire.IMAGE) is None
    assert read(nothing, wire.REGIONS) is None
    assert not read_flag(nothing, wire.STREAM)


def test_a_response_holds_its_tensors_by_their_names() -> None:
    from captionserve_server.triton.pb import response, text_array

    scores = np.array([0.5])
    outputs = outputs_of(response({wire.TEXT: text_array("a cat"), wire.SCORE: scores}))
    assert list(outputs) == ["TEXT", "SCORE"]
    assert outputs["SCORE"] is scores


@many
@given(texts=st.lists(st.one_of(st.text(), st.binary())))
def test_texts_become_bytes_and_bytes_stay(texts: list[str | bytes]) -> None:
    from captionserve_server.triton.pb import text_array

    array = text_array(*texts)
    # Numpy's own string types would drop zeros at an end.
    assert array.dtype == np.object_
    assert array.shape == (len(texts),)
    assert array.tolist() == [text.encode() if isinstance(text, str) else text for text in texts]


@many
@given(error=errors)
def test_every_error_of_another_model_is_raised_as_itself(error: CaptionServeError) -> None:
    from captionserve_server.triton.pb import error_response

    answers_with("vision_encoder", [error_response(error)])
    with pytest.raises(CaptionServeError) as raised:
        encode(np.zeros((1, 3, 2, 2), np.uint8))
    assert type(raised.value) is type(error)
    assert raised.value.message == error.message
    assert raised.value.field_violations == error.field_violations
    assert not Logger.lines


def expected_code(error_type: type[CaptionServeError]) -> int:
    codes = {
        CancelledError: TritonError.CANCELLED,
        OverloadedError: TritonError.UNAVAILABLE,
        ModelUnavailableError: TritonError.UNAVAILABLE,
        DeadlineExceededError: TritonError.UNAVAILABLE,
        ModelFaultError: TritonError.INTERNAL,
        CaptionServeError: TritonError.INTERNAL,
        # Only the gateway says these.
        UnauthenticatedError: TritonError.INTERNAL,
        ModelNotFoundError: TritonError.INTERNAL,
    }
    # All the others say that the caller must change the request.
    return codes.get(error_type, TritonError.INVALID_ARG)


@pytest.mark.parametrize("error_type", TYPES)
def test_an_error_has_the_code_that_says_what_to_do(error_type: type[CaptionServeError]) -> None:
    from captionserve_server.triton.pb import error_response

    error = error_response(made(error_type, "something is wrong", "num_beams")).error()
    assert error.code == expected_code(error_type)


def test_an_unexpected_error_is_a_fault_whose_text_stays_in_the_log() -> None:
    from captionserve_server.triton.pb import error_response

    answer = error_response(KeyError("a secret"))
    error = error_in(answer)
    assert error.reason == "MODEL_FAULT"
    assert "secret" not in answer.error().message()
    assert Logger.lines == ["unexpected KeyError: 'a secret'"]


def test_a_call_asks_the_model_of_its_version_for_the_one_output() -> None:
    states = np.ones((1, 2, 3), np.float32)
    other = Tensor("OTHER", np.zeros(1))
    asked = answers_with(
        "vision_encoder", [InferenceResponse([other, Tensor("ENCODER_STATES", states)])]
    )
    pixels = np.zeros((1, 3, 2, 2), np.uint8)
    assert encode(pixels) is states
    (request,) = asked
    assert request.model_version == 2
    assert request.requested == ["ENCODER_STATES"]
    assert list(request.tensors) == ["PIXELS"]
    assert request.tensors["PIXELS"].as_numpy() is pixels


@pytest.mark.parametrize("text", ["", "in ensemble 'x': a secret", '{"reason": "NOT_OURS"}'])
def test_another_text_is_a_fault_that_stays_in_the_log(text: str) -> None:
    answers_with("vision_encoder", [error_answer(text)])
    with pytest.raises(ModelFaultError) as raised:
        encode(np.zeros((1, 3, 2, 2), np.uint8))
    assert raised.value.message == "a model failed"
    assert Logger.lines == [f"vision_encoder: {text}"]


def test_a_decoupled_call_says_who_asks_and_for_how_long() -> None:
    asked = answers_with("decoder", [])
    assert list(decode(request_id="the-one", timeout_microseconds=5)) == []
    assert list(decode()) == []
    first, second = asked
    assert (first.request_id(), first.timeout()) == ("the-one", 5)
    assert (second.request_id(), second.timeout()) == ("", 0)
    assert first.model_version == 2
    assert first.requested == ["NEW_TEXT", "NEW_TOKEN_IDS", "NEW_BEAM_STEPS"]
    assert first.tensors["IMAGE"].as_numpy().tolist() == [b"an image"]


@many
@given(sizes=st.lists(st.integers(0, 3), max_size=6))
def test_a_decoupled_call_gives_every_response_that_holds_something(sizes: list[int]) -> None:
    # 0 is an empty response, as Triton sends it at an end.
    answers = [words(str(size), size) if size else InferenceResponse() for size in sizes]
    answers_with("decoder", answers)
    given = [(part[wire.NEW_TEXT].tolist(), len(part[wire.NEW_TOKEN_IDS])) for part in decode()]
    assert given == [([str(size).encode()], size) for size in sizes if size]


def test_a_decoupled_call_gives_each_response_before_the_next_is_there() -> None:
    made_so_far = []

    def answers() -> Iterator[InferenceResponse]:
        for number in (1, 2):
            made_so_far.append(number)
            yield words("a", number)

    answers_with("decoder", answers())
    parts = decode()
    next(parts)
    assert made_so_far == [1]


def test_an_error_in_the_midst_comes_behind_what_was_said_before() -> None:
    from captionserve_server.triton.pb import error_response

    error = error_response(InvalidRequestError("no"))
    answers_with("decoder", [words("a", 1), error, words("b", 2)])
    parts = decode()
    assert len(next(parts)[wire.NEW_TOKEN_IDS]) == 1
    with pytest.raises(InvalidRequestError, match="no"):
        next(parts)


def test_the_process_ends_with_a_line_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from captionserve_server.triton.pb import die

    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    die(KeyError("a bug"))
    assert codes == [1]
    assert Logger.lines == ["the process ends: KeyError: 'a bug'"]
