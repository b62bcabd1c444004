"""The `captioner` model: from an encoded image to its captions, in one response.

Identical requests in flight are computed once. Triton's response cache may answer before a request
comes here; because it stores every answer, one that would differ the next time must be asked for
with a NONCE, which makes it a request of its own.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from captionserve_server.core.engine.engine_thread import Captions
from captionserve_server.core.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
)
from captionserve_server.core.options import DecodingOptions
from captionserve_server.triton.callers import Caller
from captionserve_server.triton.caption_model import CaptionModel, CaptionRequest
from captionserve_server.triton.pb import ModelArguments


class TritonPythonModel(CaptionModel):
    """Answers each request once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine, and begin with nothing in flight."""
        super().initialize(args)
        self._coalesces = bool(ModelArguments(args).number("coalesce"))
        self._in_flight: dict[Hashable, _Callers] = {}
        self._lock = threading.Lock()

    def _check(self, options: DecodingOptions, nonce: int | None) -> None:
        if nonce is None and not options.reproducible:
            raise InvalidRequestError(
                "NONCE must be given for sampling without a seed and for partial captions, "
                "else Triton's response cache would repeat the answer"
            )

    def _accept(self, request: CaptionRequest) -> None:
        key = (request.image, request.plan.options, request.nonce)
        with self._lock:
            others = self._in_flight.get(key) if self._coalesces else None
            if others is not None:
                others.add(request.caller)
                return
            callers = _Callers(request.caller)
            self._in_flight[key] = callers
        self._caption(request, callers, lambda done: self._finish(key, request, callers, done))

    def _finish(
        self, key: Hashable, request: CaptionRequest, callers: _Callers, done: Future[Captions]
    ) -> None:
        with self._lock:
            if self._in_flight.get(key) is callers:
                del self._in_flight[key]
        # Nobody is added any more.
        gave_up = isinstance(done.exception(), (CancelledError, DeadlineExceededError))
        for caller in callers.all:
            if gave_up and caller.waits:
                # It came when the others had just gone.
                self._accept(dataclasses.replace(request, caller=caller))
            else:
                self._leave(caller, self._answer(done, request, request.caller.request_id))


class _Callers:
    """All who wait for the same captions."""

    def __init__(self, first: Caller) -> None:
        self.all = [first]

    def add(self, caller: Caller) -> None:
        """Let one more wait."""
        self.all.append(caller)

    @property
    def has_gone(self) -> bool:
        """Whether nobody waits any more."""
        return all(caller.has_gone for caller in self.all)

    @property
    def deadline(self) -> float:
        """The latest of all deadlines; who has less time is told by the connection."""
        return max(caller.deadline for caller in self.all)

    def hear(self, certain_tokens: Callable[[], tuple[int, ...]]) -> None:
        """Nobody listens before the end."""
