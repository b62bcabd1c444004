"""The captioner_stream on stand-ins of Triton and decoder: words at once, then the captions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from captionserve_server.core.errors import OverloadedError
from captionserve_server.triton import wire
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.triton.answered import answer_of, error_of, wait_until
from tests.unit.triton.fronts import Setup, caption, part
from tests.unit.triton.stand_in import (
    InferenceRequest,
    InferenceResponse,
    TritonError,
    outputs_of,
)


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    made = Setup("captioner_stream", monkeypatch)
    yield made
    made.close()


def words_of(request: InferenceRequest) -> list[str]:
    """The words before a request's last response."""
    return [outputs_of(each)["NEW_TEXT"][0].decode() for each in request.sender.responses[:-1]]


def test_words_are_wanted_before_the_end(setup: Setup) -> None:
    answer_of(setup.ask())
    assert setup.decoder.asked[0].tensors["STREAM"].as_numpy().tolist() == [True]


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.lists(st.text(max_size=3), max_size=5))
def test_all_words_come_in_their_order_and_the_captions_end_them(
    setup: Setup, words: list[str]
) -> None:
    setup.decoder.answers = [*map(part, words), caption("all of it")]
    request = setup.ask()
    # The stand-in's sender refuses whatever comes after the final response.
    assert outputs_of(answer_of(request))["TEXT"].tolist() == [b"all of it"]
    assert words_of(request) == words


def test_words_are_sent_before_the_captions_are_there(setup: Setup) -> None:
    def answers() -> Iterator[InferenceResponse]:
        yield part("a")
        setup.decoder.may_answer.clear()
        yield caption()

    setup.decoder.answers = answers()
    request = setup.ask()
    wait_until(lambda: len(request.sender.responses) == 1)
    assert outputs_of(request.sender.responses[0])["NEW_TOKEN_IDS"].tolist() == [1]
    assert not request.sender.final.is_set()
    setup.decoder.may_answer.set()
    answer_of(request)
    assert len(request.sender.responses) == 2


def test_an_error_in_the_midst_ends_the_words(setup: Setup) -> None:
    error = TritonError(wire.error_text(OverloadedError("no room")), TritonError.UNAVAILABLE)
    setup.decoder.answers = [part("a"), InferenceResponse(error=error), caption()]
    request = setup.ask()
    assert error_of(request).reason == "OVERLOADED"
    assert words_of(request) == ["a"]


def test_words_without_captions_are_a_fault_of_the_decoder(setup: Setup) -> None:
    setup.decoder.answers = [part("a")]
    request = setup.ask()
    assert error_of(request).reason == "MODEL_FAULT"
    assert words_of(request) == ["a"]
