"""The captioner on stand-ins of Triton and decoder: one response to each request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.triton.answered import answer_of
from tests.unit.triton.fronts import Setup, caption
from tests.unit.triton.stand_in import outputs_of


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    made = Setup("captioner", monkeypatch)
    yield made
    made.close()


def test_a_request_has_its_captions_in_one_response(setup: Setup) -> None:
    request = setup.ask()
    outputs = outputs_of(answer_of(request))
    expected = outputs_of(caption())
    assert {name: array.tolist() for name, array in outputs.items()} == {
        name: array.tolist() for name, array in expected.items()
    }
    assert len(request.sender.responses) == 1


def test_no_words_are_wanted_before_the_end(setup: Setup) -> None:
    answer_of(setup.ask())
    assert setup.decoder.asked[0].tensors["STREAM"].as_numpy().tolist() == [False]


def test_each_of_several_requests_has_its_own_answer(setup: Setup) -> None:
    for text in ("a cat", "a dog"):
        setup.decoder.answers = [caption(text)]
        request = setup.ask()
        assert outputs_of(answer_of(request))["TEXT"].tolist() == [text.encode()]
