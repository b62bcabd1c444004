"""What the models for KServe callers have in common: they ask `decoder`, and pass on what it says.

`execute` only accepts. A thread for each request in flight asks the decoder, which takes its files,
options and deadline as they came; a thread of its own watches for callers that have gone, of whom
Triton cannot tell the decoder, and tells it itself.
"""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import numpy as np

from captionserve_server.core.engine.timeline import stages_of
from captionserve_server.core.engine.worker import WorkerPool
from captionserve_server.core.errors import (
    CancelledError,
    DeadlineExceededError,
    ModelFaultError,
)
from captionserve_server.tracing import Traces, endpoint_for_models
from captionserve_server.triton import wire
from captionserve_server.triton.callers import Caller, CallerWatch
from captionserve_server.triton.pb import (
    Array,
    ModelArguments,
    Request,
    call_decoupled,
    die,
    read,
    show_life,
    text_array,
    trace_context,
)

_CLOSE_SECONDS = 10.0

Tensors = dict[wire.TensorSpec, Array]


class Front(ABC):
    """A model that asks `decoder` of its own version; subclasses say what of it they pass on.

    Attributes:
        streams: whether words are wanted as they become certain.
    """

    streams: bool

    def initialize(self, args: dict[str, str]) -> None:
        """Start the threads."""
        show_life()
        arguments = ModelArguments(args)
        self._version = arguments.version
        # How the decoder knows the requests that are in its hands.
        self._names: dict[Caller, str] = {}
        # Threads wait for the decoder and do nothing else; requests beyond them wait in the queue.
        self._asking = WorkerPool("asking", arguments.number("requests_at_once"), die)
        self._watch = CallerWatch(die, self._give_up)
        self._model = arguments.model
        self._traces = Traces(endpoint_for_models(), f"captionserve.{self._model}")

    def execute(self, requests: list[Request]) -> None:
        """Accept the requests; they are answered later, through their response senders."""
        for request in requests:
            caller = Caller(request)
            try:
                self._accept(request, caller)
            except Exception as error:  # Whatever goes wrong is this request's answer.
                caller.fail(error)

    def finalize(self) -> None:
        """End the threads; the decoder, which ends too, answers what is in flight."""
        self._asking.close(_CLOSE_SECONDS)
        self._watch.close(_CLOSE_SECONDS)
        self._traces.close()

    @abstractmethod
    def _pass_on(self, caller: Caller, answers: Iterator[Tensors]) -> None:
        """Send what the decoder says of a request, to the end."""

    def _accept(self, request: Request, caller: Caller) -> None:
        inputs = {
            spec: np.array(array)  # A copy: Triton takes the memory of its tensors back.
            for spec in wire.MESSAGE
            if (array := read(request, spec)) is not None
        }
        self._watch.add(caller)
        context = trace_context(request)
        self._asking.submit(lambda: self._serve(caller, inputs, context), caller.fail)

    def _serve(self, caller: Caller, inputs: Tensors, context: Mapping[str, str]) -> None:
        with self._traces.call(self._model, "infer", context):
            self._pass_on(caller, self._ask(inputs, caller))
        if not caller.answered:
            raise ModelFaultError("the decoder ended without an answer")

    def _ask(self, inputs: Tensors, caller: Caller) -> Iterator[Tensors]:
        """What the decoder says of a request, response by response; the last has the captions."""
        left = caller.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceededError("the deadline passed before the caption was begun")
        name = self._names[caller] = uuid.uuid4().hex
        try:
            # Asked behind the naming: of whoever goes later, the decoder is told by the name.
            if caller.has_gone:
                raise CancelledError("the caller has gone")
            answers = call_decoupled(
                wire.DECODER,
                self._version,
                {**inputs, wire.STREAM: np.array([self.streams])},
                (*wire.PART, *wire.ANSWER),
                request_id=name,
                # Rounded up: 0 would be no limit.
                timeout_microseconds=0 if math.isinf(left) else math.ceil(left * 1e6),
            )
            for answer in answers:
                if wire.TIMES in answer:
                    self._traces.stages(stages_of(answer[wire.TIMES].tolist()))
                yield answer
        finally:
            del self._names[caller]

    def _give_up(self, caller: Caller) -> None:
        """Tell the decoder that a caller has gone."""
        name = self._names.get(caller)
        if name is not None:
            for _ in call_decoupled(
                wire.DECODER, self._version, {wire.CANCEL: text_array(name)}, wire.ANSWER
            ):
                pass
