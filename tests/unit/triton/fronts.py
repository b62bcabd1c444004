"""The fronts on a stand-in of Triton, and of the decoder that they ask."""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.unit.triton.answered import WAIT_SECONDS
from tests.unit.triton.stand_in import InferenceRequest, InferenceResponse, Tensor, request_of


def text_of(tensor: Tensor) -> str:
    """The text of a string tensor of one element."""
    encoded: bytes = tensor.as_numpy()[0]
    return encoded.decode()


def part(text: str) -> InferenceResponse:
    """Words that have become certain, as the decoder tells them."""
    encoded = np.array([text.encode()], np.object_)
    ids = np.array([len(text)], np.int32)
    return InferenceResponse([Tensor("NEW_TEXT", encoded), Tensor("NEW_TOKEN_IDS", ids)])


def caption(text: str = "a cat") -> InferenceResponse:
    """A caption, as the decoder tells it; the fronts look at none of its other tensors."""
    encoded = np.array([text.encode()], np.object_)
    return InferenceResponse([Tensor("TEXT", encoded), Tensor("SCORE", np.array([-0.5]))])


class Decoder:
    """Answers for `decoder` what a test says, and keeps what it is asked.

    Attributes:
        answers: what it answers to a message.
        may_answer: cleared, it keeps who asks waiting.
        asked: the messages.
        given_up: the requests of which it is told that nobody waits.
    """

    def __init__(self) -> None:
        self.answers: Iterable[InferenceResponse] = [caption()]
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.asked: list[InferenceRequest] = []
        self.given_up: list[str] = []

    def __call__(self, request: InferenceRequest) -> Iterator[InferenceResponse]:
        given_up = request.tensors.get("CANCEL")
        if given_up is not None:
            self.given_up.append(text_of(given_up))
            yield InferenceResponse()
            return
        self.asked.append(request)
        for answer in self.answers:
            assert self.may_answer.wait(WAIT_SECONDS)
            yield answer
        # As Triton, where the model's last response was not the final one.
        yield InferenceResponse()


class Setup:
    """A front, with a decoder to ask."""

    def __init__(self, module: str, monkeypatch: pytest.MonkeyPatch, threads: int = 1) -> None:
        self.decoder = Decoder()
        InferenceRequest.models["decoder"] = self.decoder
        self.exits: list[int] = []
        monkeypatch.setattr(os, "_exit", self.exits.append)
        # Imported here, when the stand-in is in its place.
        self.model: Any = importlib.import_module(
            f"captionserve_server.triton.{module}"
        ).TritonPythonModel()
        config = {"parameters": {"requests_at_once": {"string_value": str(threads)}}}
        self.model.initialize(
            {
                "model_config": json.dumps(config),
                "model_name": "captioner",
                "model_repository": "repository",
                "model_version": "3",
            }
        )

    def ask(self, timeout: int = 0, **inputs: Any) -> InferenceRequest:
        """Send a request; an image where nothing else is said."""
        request = request_of(timeout=timeout, **({"IMAGE": b"an image"} | inputs))
        self.model.execute([request])
        return request

    @property
    def watched(self) -> int:
        """Callers that are looked after."""
        return len(self.model._watch._callers)

    def close(self) -> None:
        """End the front, which must not have ended its process before."""
        self.decoder.may_answer.set()
        self.model.finalize()
        assert not self.exits
