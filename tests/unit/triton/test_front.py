"""What both fronts do: ask the decoder, pass its word on, and tell it who has gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from captionserve_server.core.errors import CancelledError, OverloadedError
from captionserve_server.triton import wire

from tests.unit.triton.answered import WAIT_SECONDS, answer_of, error_of, wait_until
from tests.unit.triton.fronts import Setup, caption, part
from tests.unit.triton.stand_in import (
    InferenceResponse,
    Logger,
    TritonError,
    outputs_of,
    request_of,
)


@pytest.fixture(params=["captioner", "captioner_stream"])
def setup(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    made = Setup(request.param, monkeypatch)
    yield made
    made.close()


def error_answer(text: str) -> InferenceResponse:
    return InferenceResponse(error=TritonError(text, TritonError.INTERNAL))


def test_the_decoder_of_the_same_version_gets_the_message_as_it_came(setup: Setup) -> None:
    regions = np.arange(8, dtype=np.int32).reshape(2, 4)
    answer_of(setup.ask(REGIONS=regions, OPTIONS='{"num_beams": 2}'))
    (asked,) = setup.decoder.asked
    assert asked.model_version == 3
    assert set(asked.tensors) == {"IMAGE", "REGIONS", "OPTIONS", "STREAM"}
    assert asked.tensors["IMAGE"].as_numpy().tolist() == [b"an image"]
    assert asked.tensors["OPTIONS"].as_numpy().tolist() == [b'{"num_beams": 2}']
    assert asked.tensors["REGIONS"].as_numpy().tolist() == regions.tolist()
    assert asked.tensors["STREAM"].as_numpy().tolist() == [setup.model.streams]
    assert set(asked.requested) == {spec.name for spec in (*wire.PART, *wire.ANSWER)}


def test_a_message_that_waits_keeps_its_values_when_triton_takes_its_memory(setup: Setup) -> None:
    setup.decoder.may_answer.clear()
    setup.ask()
    values = np.ones((3, 2, 2), np.float32)
    request = request_of(PIXEL_VALUES=values)
    setup.model.execute([request])
    values[:] = 0
    setup.decoder.may_answer.set()
    answer_of(request)
    assert setup.decoder.asked[1].tensors["PIXEL_VALUES"].as_numpy().tolist() == (
        np.ones((3, 2, 2)).tolist()
    )


def test_the_decoder_is_told_the_time_that_is_left(setup: Setup) -> None:
    setup.decoder.may_answer.clear()
    setup.ask()
    limited = setup.ask(timeout=50_000_000)
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() > begin)
    setup.decoder.may_answer.set()
    answer_of(limited)
    unlimited, asked = setup.decoder.asked
    assert unlimited.timeout() == 0
    assert 0 < asked.timeout() < 50_000_000


def test_a_rest_of_a_microsecond_is_not_told_as_no_limit(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captionserve_server.triton import front
    from captionserve_server.triton.callers import Caller

    caller = Caller(request_of())
    caller.deadline = 1e-7
    monkeypatch.setattr(front, "time", SimpleNamespace(monotonic=lambda: 0.0))
    list(setup.model._ask({}, caller))
    assert setup.decoder.asked[0].timeout() == 1


def test_whose_time_passes_in_the_queue_is_not_decoded(setup: Setup) -> None:
    setup.decoder.may_answer.clear()
    first = setup.ask()
    late = setup.ask(timeout=1)
    begin = time.monotonic()
    wait_until(lambda: time.monotonic() > begin + 1e-6)
    setup.decoder.may_answer.set()
    assert error_of(late).reason == "DEADLINE_EXCEEDED"
    assert not answer_of(first).has_error()
    assert len(setup.decoder.asked) == 1


def test_of_whom_has_gone_the_decoder_is_told_by_the_name_that_it_knows(setup: Setup) -> None:
    setup.decoder.may_answer.clear()
    gone = setup.ask()
    wait_until(lambda: len(setup.decoder.asked) == 1)
    gone.sender.cancelled = True
    wait_until(lambda: bool(setup.decoder.given_up))
    (asked,) = setup.decoder.asked
    assert setup.decoder.given_up == [asked.request_id()]
    # What the decoder makes of it is the caller's answer, and the next one has another name.
    setup.decoder.answers = [error_answer(wire.error_text(CancelledError("gone")))]
    setup.decoder.may_answer.set()
    answer_of(gone)
    answer_of(setup.ask())
    assert len({each.request_id() for each in setup.decoder.asked}) == 2


def test_who_goes_in_the_queue_is_not_decoded(setup: Setup) -> None:
    setup.decoder.may_answer.clear()
    first, gone = setup.ask(), setup.ask()
    gone.sender.cancelled = True
    wait_until(lambda: setup.watched == 1)
    setup.decoder.may_answer.set()
    assert error_of(gone).reason == "CANCELLED"
    assert not answer_of(first).has_error()
    assert len(setup.decoder.asked) == 1
    assert not setup.decoder.given_up


def test_who_has_an_answer_is_not_given_up(setup: Setup) -> None:
    answer_of(setup.ask())
    wait_until(lambda: setup.watched == 0)
    assert not setup.decoder.given_up
    wait_until(lambda: not setup.model._names)


def test_an_error_of_the_decoder_is_the_callers(setup: Setup) -> None:
    setup.decoder.answers = [error_answer(wire.error_text(OverloadedError("no room")))]
    request = setup.ask()
    assert error_of(request).reason == "OVERLOADED"
    assert error_of(request).message == "no room"
    error = answer_of(request).error()
    assert error is not None
    assert error.code == TritonError.UNAVAILABLE
    assert not setup.model._names


def test_what_is_no_error_of_ours_is_a_fault_without_its_text(setup: Setup) -> None:
    setup.decoder.answers = [error_answer("a secret")]
    error = error_of(setup.ask())
    assert error.reason == "MODEL_FAULT"
    assert "secret" not in error.message
    assert Logger.lines == ["decoder: a secret"]


def test_a_decoder_that_ends_without_an_answer_is_at_fault(setup: Setup) -> None:
    setup.decoder.answers = []
    assert error_of(setup.ask()).reason == "MODEL_FAULT"


def test_requests_beyond_the_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("captioner", monkeypatch, threads=2)
    setup.decoder.may_answer.clear()
    requests = [setup.ask() for _ in range(5)]
    wait_until(lambda: len(setup.decoder.asked) == 2)
    assert setup.model._asking._jobs.qsize() == 3
    setup.decoder.may_answer.set()
    for request in requests:
        assert not answer_of(request).has_error()
    setup.close()


@pytest.mark.parametrize(
    "answers", [[caption()], [part("a"), caption()], [error_answer("an error")]]
)
def test_an_answer_that_cannot_be_sent_is_lost_alone(
    setup: Setup, answers: list[InferenceResponse]
) -> None:
    setup.decoder.answers = answers
    lost = request_of(IMAGE=b"an image")
    lost.sender.fails = True
    setup.model.execute([lost])
    assert lost.sender.final.wait(WAIT_SECONDS)
    setup.decoder.answers = [caption()]
    assert not answer_of(setup.ask()).has_error()
    assert any("the response cannot be sent" in line for line in Logger.lines)


def test_at_closing_the_queue_is_answered_and_newcomers_are_refused(setup: Setup) -> None:
    setup.decoder.may_answer.clear()
    queued = [setup.ask() for _ in range(4)]
    closing = threading.Thread(target=setup.model.finalize)
    closing.start()
    wait_until(lambda: setup.model._asking._closed)
    assert error_of(setup.ask()).reason == "MODEL_UNAVAILABLE"
    setup.decoder.may_answer.set()
    closing.join(WAIT_SECONDS)
    for request in queued:
        assert request.sender.final.is_set()
        assert outputs_of(request.sender.responses[-1])["TEXT"].tolist() == [b"a cat"]


def test_a_refusal_that_cannot_be_sent_costs_its_neighbours_no_answer(setup: Setup) -> None:
    setup.model.finalize()
    lost, refused = request_of(IMAGE=b"an image"), request_of(IMAGE=b"an image")
    lost.sender.fails = True
    setup.model.execute([lost, refused])
    assert error_of(refused).reason == "MODEL_UNAVAILABLE"
