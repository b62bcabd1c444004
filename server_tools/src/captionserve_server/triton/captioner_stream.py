"""The `captioner_stream` model, for KServe callers: the words as they become certain, decoupled."""

from __future__ import annotations

from collections.abc import Iterator

from captionserve_server.triton import wire
from captionserve_server.triton.callers import Caller
from captionserve_server.triton.front import Front, Tensors
from captionserve_server.triton.pb import response


class TritonPythonModel(Front):
    """Answers each request with parts and an end."""

    streams = True

    def _pass_on(self, caller: Caller, answers: Iterator[Tensors]) -> None:
        for answer in answers:
            if wire.TEXT in answer:
                caller.finish(response(answer))
            else:
                caller.send(response(answer))
