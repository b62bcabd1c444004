"""The `captioner` model: from an encoded image to its captions.

`execute` only accepts. A pool of threads has each image preprocessed and encoded by the other
models, in parallel, so that Triton's dynamic batcher sees them together; the engine thread decodes
all of them as one batch. Live captions never wait for an image that is being encoded.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

from captionserve_server.core import tensors
from captionserve_server.core.bundle import BUNDLE_FILE, TOKENIZER_FILE, Bundle
from captionserve_server.core.engine import CaptionEngine
from captionserve_server.core.errors import OverloadedError
from captionserve_server.core.options import DecodingOptions
from captionserve_server.core.search import DecodedCaption
from captionserve_server.core.step_model import Float32Array
from captionserve_server.triton.engine_thread import Captions, EngineThread
from captionserve_server.triton.requests import (
    Array,
    ModelArguments,
    Request,
    call_model,
    error_response,
    read,
    read_required,
    response,
    text_array,
)
from captionserve_server.triton.triton_step_model import TritonStepModel

# Each thread waits for one image's preprocessing or encoding; twice the encoder's largest batch
# keeps a full batch gathering while another one runs.
_ENCODING_THREADS = 16


class TritonPythonModel:
    """Accepts requests and answers them from the engine."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle and the tokenizer, and start the engine."""
        arguments = ModelArguments(args)
        folder = Path(arguments.repository) / str(arguments.version)
        self._version = arguments.version
        self._bundle = Bundle.from_json((folder / BUNDLE_FILE).read_text())
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        self._max_requests = arguments.number("max_requests")
        self._in_flight = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_ENCODING_THREADS, thread_name_prefix="encoding")
        self._engine = EngineThread(
            CaptionEngine(
                TritonStepModel(self._version),
                self._bundle.special,
                arguments.number("max_rows"),
            ),
            pb_utils.Logger.log_error,
        )

    def execute(self, requests: list[Request]) -> None:
        """Accept the requests; they are answered later, through their response senders."""
        for request in requests:
            self._accept(request)

    def finalize(self) -> None:
        """Stop taking work in and end the threads."""
        self._pool.shutdown(cancel_futures=True)
        self._engine.close()

    def _accept(self, request: Request) -> None:
        reply = _Reply(request)
        try:
            encoded = read_required(request, tensors.IMAGE)
            options = self._options(request)
            self._enter()
        except Exception as error:  # Whatever goes wrong is this request's answer.
            reply.send(error_response(error))
            return
        self._pool.submit(self._start, encoded, options, reply)

    def _enter(self) -> None:
        with self._lock:
            if self._in_flight >= self._max_requests:
                raise OverloadedError("too many requests are waiting")
            self._in_flight += 1

    def _options(self, request: Request) -> DecodingOptions:
        given = {
            name: _plain(array[0])
            for name, spec in tensors.OPTION_TENSORS.items()
            if (array := read(request, spec)) is not None
        }
        options = self._bundle.defaults.with_given(given)
        self._bundle.check(options)
        return options

    def _start(self, encoded: Array, options: DecodingOptions, reply: _Reply) -> None:
        """Encode one image and hand it to the engine."""
        try:
            future = self._engine.submit(self._encode(encoded), options, reply.is_abandoned)
        except Exception as error:  # Whatever goes wrong is this request's answer.
            self._finish(reply, error_response(error))
            return
        future.add_done_callback(lambda done: self._finish(reply, self._answer(done)))

    def _encode(self, encoded: Array) -> Float32Array:
        (pixels,) = call_model(
            tensors.PREPROCESS, self._version, {tensors.IMAGE: encoded}, tensors.PIXELS
        )
        (states,) = call_model(
            tensors.VISION_ENCODER,
            self._version,
            {tensors.PIXELS: pixels[None]},
            tensors.ENCODER_STATES,
        )
        first: Float32Array = states[0]
        return first

    def _answer(self, done: Future[Captions]) -> Any:
        error = done.exception()
        if isinstance(error, Exception):
            return error_response(error)
        return _captions_response(done.result(), self._tokenizer)

    def _finish(self, reply: _Reply, answer: Any) -> None:
        with self._lock:
            self._in_flight -= 1
        reply.send(answer)


class _Reply:
    """The one answer to one request."""

    def __init__(self, request: Request) -> None:
        self._sender = request.get_response_sender()

    def is_abandoned(self) -> bool:
        """Whether the caller has cancelled, or its deadline has passed."""
        return bool(self._sender.is_cancelled())

    def send(self, answer: Any) -> None:
        """Answer, once."""
        self._sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _plain(value: Any) -> Any:
    """A tensor's element as a Python value."""
    return value.decode() if isinstance(value, bytes) else value.item()


def _captions_response(captions: list[DecodedCaption], tokenizer: Tokenizer) -> Any:
    longest = max(len(caption.token_ids) for caption in captions)
    token_ids = np.full((len(captions), longest), tensors.PADDING_TOKEN_ID, np.int32)
    logprobs = np.zeros((len(captions), longest), np.float32)
    for row, caption in enumerate(captions):
        token_ids[row, : len(caption.token_ids)] = caption.token_ids
        logprobs[row, : len(caption.token_ids)] = caption.token_logprobs
    texts = [tokenizer.decode(list(caption.token_ids)).strip() for caption in captions]
    return response(
        {
            tensors.TEXT: text_array(*texts),
            tensors.SCORE: np.array([caption.score for caption in captions], np.float64),
            tensors.FINISH_REASON: text_array(*(caption.finish_reason for caption in captions)),
            tensors.TOKEN_IDS: token_ids,
            tensors.TOKEN_LOGPROBS: logprobs,
        }
    )
