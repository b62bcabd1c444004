"""A Triton model that calls transformers' generate() for each request, as tutorials do."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from PIL import Image
from transformers import AutoImageProcessor, VisionEncoderDecoderModel


class TritonPythonModel:
    """The checkpoint named in the configuration, in float32."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the checkpoint."""
        parameters = json.loads(args["model_config"])["parameters"]
        checkpoint = parameters["checkpoint"]["string_value"]
        self._processor = AutoImageProcessor.from_pretrained(checkpoint, use_fast=False)
        model: Any = VisionEncoderDecoderModel.from_pretrained(checkpoint, dtype=torch.float32)
        self._model = model.eval()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Caption one image after the other."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        file = pb_utils.get_input_tensor_by_name(request, "IMAGE").as_numpy()[0]
        options = pb_utils.get_input_tensor_by_name(request, "OPTIONS").as_numpy()[0]
        picture = Image.open(io.BytesIO(file)).convert("RGB")
        pixels = self._processor(picture, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            output = self._model.generate(pixel_values=pixels, **json.loads(options))
        # Without the start token.
        tokens = pb_utils.Tensor("TOKEN_IDS", output[0, 1:].numpy().astype(np.int64))
        return pb_utils.InferenceResponse(output_tensors=[tokens])
