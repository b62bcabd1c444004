"""A process that captions with generate(): transformers' own models, or optimum's.

    python generate_worker.py transformers|optimum CHECKPOINT MODEL IMAGES

Imports nothing of ours, so that it runs in an environment that lacks us. Speaks JSON, a line each
way; see `serve_lines`.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def read_images(folder: str) -> list[bytes]:
    """The files of a folder, in the order of their names."""
    return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


def versions_of(*distributions: str) -> dict[str, str]:
    """Installed versions by name."""
    return {name: importlib.metadata.version(name) for name in distributions}


def serve_lines(load: Callable[[], tuple[dict[str, str], Callable[..., Answer]]]) -> None:
    """Answer lines on standard input until it ends.

    The first line out says {"versions": {...}}, once the model is loaded. Then each line in is
    {"images": n, "load": n, "options": {...}} and its answer
    {"seconds": s, "latencies": [s, ...], "token_ids": [[...], ...]}.

    Args:
        load: gives versions and what answers a request, given its entries by name.
    """
    # Libraries print; what they print must not get among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    versions, answer = load()
    _write(answers, {"versions": versions})
    for line in sys.stdin:
        _write(answers, answer(**json.loads(line)))


def _write(stream: Any, value: Answer) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


class GenerateWorker:
    """A model with generate(), and its image processor."""

    def __init__(self, model: Any, processor: Any, images: list[bytes]) -> None:
        """Keep them; images are JPEG files."""
        self._model = model
        self._processor = processor
        self._images = images
        end = model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [end])

    def answer(self, images: int, load: int, options: dict[str, int]) -> Answer:
        """Caption the first `images` images in batches of `load`."""
        latencies: list[float] = []
        token_ids: list[list[int]] = []
        begin = time.perf_counter()
        for first in range(0, images, load):
            batch_begin = time.perf_counter()
            batch = range(first, min(first + load, images))
            files = [self._images[image % len(self._images)] for image in batch]
            token_ids += self._captions(files, options)
            latencies += [time.perf_counter() - batch_begin] * len(batch)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "latencies": latencies, "token_ids": token_ids}

    def _captions(self, files: list[bytes], options: dict[str, int]) -> list[list[int]]:
        import torch
        from PIL import Image

        pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        pixels = self._processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            output = self._model.generate(pixel_values=pixels, **options)
        return [self._generated(row) for row in output.tolist()]

    def _generated(self, row: list[int]) -> list[int]:
        """A row without start token and padding, with the end token if it was produced."""
        tokens = row[1:]
        ends = [place for place, token in enumerate(tokens) if token in self._ends]
        return tokens[: ends[0] + 1] if ends else tokens


def _load_transformers(folder: str) -> Any:
    import torch
    from transformers import VisionEncoderDecoderModel

    return VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).eval()


def _load_optimum(folder: str) -> Any:
    from optimum.onnxruntime import ORTModelForVision2Seq

    return ORTModelForVision2Seq.from_pretrained(folder)


_KINDS: dict[str, tuple[Callable[[str], Any], tuple[str, ...]]] = {
    "transformers": (_load_transformers, ("transformers", "torch")),
    "optimum": (_load_optimum, ("optimum-onnx", "transformers", "onnxruntime", "torch")),
}


def main() -> None:
    """Load what the command line names and serve it."""
    kind, checkpoint, model_folder, images = sys.argv[1:]
    load_model, distributions = _KINDS[kind]

    def load() -> tuple[dict[str, str], Callable[..., Answer]]:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(checkpoint, use_fast=False)
        worker = GenerateWorker(load_model(model_folder), processor, read_images(images))
        return versions_of(*distributions), worker.answer

    serve_lines(load)


if __name__ == "__main__":
    main()
