"""Waiting for what models answer, and for what their threads do."""

from __future__ import annotations

import time
from collections.abc import Callable

from captionserve_server.core.errors import CaptionServeError

# It knows no Triton, and so may be imported without the stand-in.
from captionserve_server.triton.wire import error_of_text

from tests.unit.triton.stand_in import InferenceRequest, InferenceResponse

WAIT_SECONDS = 60.0


def answer_of(request: InferenceRequest) -> InferenceResponse:
    """A request's last response."""
    assert request.sender.final.wait(WAIT_SECONDS)
    return request.sender.responses[-1]


def error_in(response: InferenceResponse) -> CaptionServeError:
    """The error of ours that a response carries."""
    error = response.error()
    assert error is not None
    found = error_of_text(error.message())
    assert found is not None
    return found


def error_of(request: InferenceRequest) -> CaptionServeError:
    """The error that a request is answered with."""
    return error_in(answer_of(request))


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until something has come about in another thread."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
