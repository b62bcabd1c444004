"""The `preprocess` model: an encoded image to the encoder's pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from captionserve_server.core.bundle import PREPROCESSOR_FILE
from captionserve_server.core.preprocessing import PreprocessorConfig, preprocess
from captionserve_server.core.tensors import IMAGE, PIXELS
from captionserve_server.triton.requests import (
    ModelArguments,
    Request,
    error_response,
    read_required,
    response,
)


class TritonPythonModel:
    """Decodes and resizes one image per request."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the checkpoint's image processor settings."""
        arguments = ModelArguments(args)
        path = Path(arguments.repository) / str(arguments.version) / PREPROCESSOR_FILE
        self._config = PreprocessorConfig.from_json(json.loads(path.read_text()))

    def execute(self, requests: list[Request]) -> list[Any]:
        """Answer each request on its own: a bad image spoils no other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Any:
        try:
            encoded = bytes(read_required(request, IMAGE)[0])
            return response({PIXELS: preprocess(encoded, self._config)})
        except Exception as error:  # Whatever goes wrong is this request's answer.
            return error_response(error)
