"""What `captioner` and `captioner_stream` have in common: from a request to decoded captions.

`execute` only accepts. A pool of threads has the images preprocessed, in parallel; the engine's
thread encodes them and decodes all of them as one batch. A thread of its own builds and sends the
answers, in their order.
"""

from __future__ import annotations

import dataclasses
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from captionserve_server.core.bundle import BUNDLE_FILE, TOKENIZER_FILE, Bundle
from captionserve_server.core.captions import CaptionPlan
from captionserve_server.core.engine.engine_thread import Audience, Captions, EngineThread
from captionserve_server.core.engine.scheduler import CaptionEngine, EngineLimits
from captionserve_server.core.errors import CancelledError, OverloadedError
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.results import Finisher
from captionserve_server.core.search import Vocabulary
from captionserve_server.core.step_model import UInt8Array
from captionserve_server.triton import wire
from captionserve_server.triton.callers import Caller, CallerWatch
from captionserve_server.triton.caption_tensors import caption_response
from captionserve_server.triton.metrics import Counter, Gauge
from captionserve_server.triton.pace import Pace
from captionserve_server.triton.pb import (
    Array,
    ModelArguments,
    Request,
    call_model,
    error_response,
    read,
    read_required,
    text_array,
)
from captionserve_server.triton.triton_step_model import TritonEncoder, TritonStepModel

# Each thread waits for one image; enough for all instances of `preprocess` on a large machine.
_PREPROCESSING_THREADS = 16


@dataclasses.dataclass(frozen=True)
class CaptionRequest:
    """One request to the model.

    Attributes:
        image: an encoded image file.
        plan: how to decode.
        nonce: sets the request apart from others that are alike; None when it was left out.
        caller: who asked.
    """

    image: bytes
    plan: CaptionPlan
    nonce: int | None
    caller: Caller


class CaptionModel(ABC):
    """A Triton model that captions images; subclasses say how they answer."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle and the tokenizer, and start the engine."""
        arguments = ModelArguments(args)
        folder = Path(arguments.repository) / str(arguments.version)
        self._version = arguments.version
        self._bundle = Bundle.from_json((folder / BUNDLE_FILE).read_text())
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        self._finisher = Finisher(self._bundle, self._tokenizer.decode)
        self._room = _Room(arguments.number("max_requests"))
        self._preprocessing = ThreadPoolExecutor(
            _PREPROCESSING_THREADS, thread_name_prefix="preprocessing"
        )
        self._answering = ThreadPoolExecutor(1, thread_name_prefix="answering")
        self._watch = CallerWatch()
        engine = CaptionEngine(
            TritonEncoder(self._version),
            TritonStepModel(arguments.name, self._version),
            Vocabulary(self._bundle.special, self._bundle.geometry.vocabulary_size),
            EngineLimits(
                max_rows=arguments.number("max_rows"),
                max_entries=arguments.number("max_entries"),
                max_admissions=arguments.number("max_admissions"),
            ),
        )
        metrics = _EngineMetrics(engine, arguments)
        self._engine = EngineThread(engine, pb_utils.Logger.log_error, metrics.count)

    def execute(self, requests: list[Request]) -> None:
        """Accept the requests; they are answered later, through their response senders."""
        for request in requests:
            caller = Caller(request)
            try:
                accepted = self._read(request, caller)
                self._room.enter()
            except Exception as error:  # Whatever goes wrong is this request's answer.
                caller.finish(error_response(error))
                continue
            self._watch.add(caller)
            self._accept(accepted)

    def finalize(self) -> None:
        """Stop taking work in and end the threads."""
        self._preprocessing.shutdown(cancel_futures=True)
        self._engine.close()
        self._answering.shutdown()
        self._watch.close()

    @abstractmethod
    def _accept(self, request: CaptionRequest) -> None:
        """Begin to answer a request; `_leave` when it is answered."""

    @abstractmethod
    def _check(self, options: DecodingOptions, nonce: int | None) -> None:
        """Refuse what this model cannot answer; raises an InvalidRequestError."""

    def _caption(
        self, request: CaptionRequest, audience: Audience, then: Callable[[Future[Captions]], None]
    ) -> None:
        """Caption an image for its audience; `then` is called with the captions."""
        self._preprocessing.submit(self._preprocess_and_submit, request, audience, then)

    def _preprocess_and_submit(
        self, request: CaptionRequest, audience: Audience, then: Callable[[Future[Captions]], None]
    ) -> None:
        try:
            if audience.has_gone:
                raise CancelledError("the caller has gone")
            future = self._engine.submit(self._pixels(request.image), request.plan, audience)
        except Exception as error:  # Whatever goes wrong is this request's answer.
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda done: self._answering.submit(then, done))

    def _leave(self, caller: Caller, answer: Any) -> None:
        """Answer a caller for the last time and make room for the next."""
        self._room.leave()
        caller.finish(answer)

    def _read(self, request: Request, caller: Caller) -> CaptionRequest:
        image = bytes(read_required(request, wire.IMAGE)[0])
        given = {
            name: _plain(array, one=spec.dims == (1,))
            for name, spec in wire.OPTION_TENSORS.items()
            if (array := read(request, spec)) is not None
        }
        plan = self._bundle.plan(given, self._encode_text)
        nonce = read(request, wire.NONCE)
        number = None if nonce is None else int(nonce[0])
        self._check(plan.options, number)
        return CaptionRequest(image, plan, number, caller)

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _pixels(self, image: bytes) -> UInt8Array:
        """What the encoder sees of an image file, uint8 [3, height, width]."""
        inputs = {wire.IMAGE: text_array(image)}
        (pixels,) = call_model(wire.PREPROCESS, self._version, inputs, wire.PIXELS)
        return pixels

    def _answer(self, done: Future[Captions], request: CaptionRequest, request_id: str) -> Any:
        """The last response: the captions, or what went wrong."""
        error = done.exception()
        if isinstance(error, Exception):
            return error_response(error)
        finished = [self._finisher.finished(each, request.plan) for each in done.result()]
        return caption_response(finished, request_id)


class _EngineMetrics:
    """What the engine does, among Triton's metrics."""

    def __init__(self, engine: CaptionEngine, arguments: ModelArguments) -> None:
        labels = {"model": arguments.name, "version": str(arguments.version)}
        self._engine = engine
        self._live = Gauge("captionserve_live_captions", "Captions being decoded.", labels)
        self._waiting = Gauge("captionserve_waiting_captions", "Captions without a slot.", labels)
        self._steps = Counter("captionserve_engine_steps_total", "Decoding steps.", labels)
        self._seconds = Counter("captionserve_engine_seconds_total", "Time spent decoding.", labels)
        self._pace = Pace()
        self._steps_taken = 0
        self._seconds_spent = 0.0

    def count(self, seconds: float) -> None:
        """Count a step that took so long; all counts are shown once the engine is idle."""
        self._steps_taken += 1
        self._seconds_spent += seconds
        if self._engine.idle or self._pace.is_due():
            self._show()

    def _show(self) -> None:
        self._live.set(self._engine.live)
        self._waiting.set(self._engine.waiting)
        self._steps.raise_to(self._steps_taken)
        self._seconds.raise_to(self._seconds_spent)


class _Room:
    """Counts the requests that are in the model."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside = 0
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Count one more; raises OverloadedError when there is no room."""
        with self._lock:
            if self._inside >= self._most:
                raise OverloadedError("too many requests are waiting")
            self._inside += 1

    def leave(self) -> None:
        """Count one less."""
        with self._lock:
            self._inside -= 1


def _plain(array: Array, *, one: bool) -> Any:
    """A tensor as a Python value, or as a tuple of them."""
    values = [value.decode() if isinstance(value, bytes) else value for value in array.tolist()]
    return values[0] if one else tuple(values)
