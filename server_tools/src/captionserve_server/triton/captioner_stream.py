"""The `captioner_stream` model: a caption's words as they become certain, then the captions.

A decoupled sibling of `captioner` with an engine of its own; both share decoder_step's slots.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from captionserve_server.core.detokenise import Decode, TextStream
from captionserve_server.core.engine.engine_thread import Captions
from captionserve_server.core.options import DecodingOptions
from captionserve_server.triton import wire
from captionserve_server.triton.callers import Caller
from captionserve_server.triton.caption_model import CaptionModel, CaptionRequest
from captionserve_server.triton.pb import response, text_array


class TritonPythonModel(CaptionModel):
    """Answers each request with parts and an end."""

    def _check(self, options: DecodingOptions, nonce: int | None) -> None:
        """Everything can be streamed: decoupled models have no response cache."""

    def _accept(self, request: CaptionRequest) -> None:
        listener = _Listener(request, self._tokenizer.decode, self._answering)
        self._caption(request, listener, lambda done: self._finish(request, listener, done))

    def _finish(self, request: CaptionRequest, listener: _Listener, done: Future[Captions]) -> None:
        if done.exception() is None:
            listener.send(done.result()[0].token_ids)
        self._leave(request.caller, self._answer(done, request, request.caller.request_id))


class _Listener:
    """One caller who hears the words as they become certain."""

    def __init__(
        self, request: CaptionRequest, decode: Decode, answering: ThreadPoolExecutor
    ) -> None:
        self._caller: Caller = request.caller
        self._prefix = request.plan.words.prefix
        self._text = TextStream(decode)
        self._answering = answering
        self._known = 0
        self._sent = 0

    @property
    def has_gone(self) -> bool:
        """Whether the caller has gone."""
        return self._caller.has_gone

    @property
    def deadline(self) -> float:
        """The caller's deadline."""
        return self._caller.deadline

    def hear(self, certain_tokens: Callable[[], tuple[int, ...]]) -> None:
        """Have what is new sent by another thread."""
        tokens = certain_tokens()
        if len(tokens) > self._known:
            self._known = len(tokens)
            self._answering.submit(self.send, tokens)

    def send(self, certain: tuple[int, ...]) -> None:
        """Send the tokens that are new; all of `certain` will stay."""
        new = certain[self._sent :]
        if not new:
            return
        self._sent = len(certain)
        self._caller.send(
            response(
                {
                    wire.NEW_TEXT: text_array(self._text.next_text([*self._prefix, *certain])),
                    wire.NEW_TOKEN_IDS: np.array(new, np.int32),
                }
            )
        )
