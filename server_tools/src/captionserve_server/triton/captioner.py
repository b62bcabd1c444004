"""The `captioner` model, for KServe callers: a message in, its captions in one response."""

from __future__ import annotations

from collections.abc import Iterator

from captionserve_server.triton.callers import Caller
from captionserve_server.triton.front import Front, Tensors
from captionserve_server.triton.pb import response


class TritonPythonModel(Front):
    """Answers each request once."""

    streams = False

    def _pass_on(self, caller: Caller, answers: Iterator[Tensors]) -> None:
        for answer in answers:
            caller.finish(response(answer))
