"""The `preprocess` model: an encoded image to the encoder's pixels.

`execute` only accepts; threads, one for each core, decode and resize, and answer through the
request's response sender: Pillow holds no lock meanwhile. Triton counts the time of `execute` only,
so the true one is a metric of ours.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from captionserve_server.core.bundle import PREPROCESSOR_FILE
from captionserve_server.core.preprocessing import PreprocessorConfig, preprocess
from captionserve_server.runtime.cores import available_cores
from captionserve_server.triton.metrics import Counter
from captionserve_server.triton.pb import (
    ModelArguments,
    Request,
    error_response,
    read_required,
    response,
)
from captionserve_server.triton.wire import IMAGE, PIXELS


class TritonPythonModel:
    """Decodes and resizes one image per request."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the checkpoint's image processor settings."""
        arguments = ModelArguments(args)
        path = Path(arguments.repository) / str(arguments.version) / PREPROCESSOR_FILE
        self._config = PreprocessorConfig.from_json(json.loads(path.read_text()))

        threads = arguments.threads("threads") or available_cores()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="preprocess")
        self._metrics = _Metrics(arguments.version)

    def execute(self, requests: list[Request]) -> None:
        """Accept the requests; a bad image spoils no other."""
        for request in requests:
            self._pool.submit(self._run, request, request.get_response_sender())

    def finalize(self) -> None:
        """Answer what has been accepted, and end the threads."""
        self._pool.shutdown()

    def _run(self, request: Request, sender: Any) -> None:
        begin = time.perf_counter()
        answer = self._answer(request)
        self._metrics.count(time.perf_counter() - begin)
        sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Request) -> Any:
        try:
            encoded = bytes(read_required(request, IMAGE)[0])
            return response({PIXELS: preprocess(encoded, self._config)})
        except Exception as error:  # Whatever goes wrong is this request's answer.
            return error_response(error)


class _Metrics:
    """The time spent on images, over all threads."""

    def __init__(self, version: int) -> None:
        self._counter = Counter(
            "captionserve_preprocess_seconds_total",
            "Time spent decoding and resizing images, over all threads.",
            {"version": str(version)},
        )
        self._seconds = 0.0
        self._lock = threading.Lock()

    def count(self, seconds: float) -> None:
        """Count an image that took so long."""
        with self._lock:
            self._seconds += seconds
            self._counter.raise_to(self._seconds)
