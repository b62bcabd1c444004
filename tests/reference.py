"""The source of truth: transformers' own image processor and generate()."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import VisionEncoderDecoderModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

# The models are tiny: a second thread only waits, and far longer when the cores are busy.
torch.set_num_threads(1)


@dataclass(frozen=True)
class ReferenceCaption:
    """What generate() gave, in the form of our contract.

    Attributes:
        token_ids: without start token and padding, with the end token.
        score: sequences_scores of beam search; for greedy search computed by its formula.
    """

    token_ids: tuple[int, ...]
    score: float


class Reference:
    """A checkpoint in transformers."""

    def __init__(self, folder: Path) -> None:
        """Load model and image processor."""
        self.model = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = ViTImageProcessorPil.from_pretrained(folder)
        end = self.model.generation_config.eos_token_id
        self._end = set(end if isinstance(end, list) else [end])

    def captions(self, image: Image.Image, **options: Any) -> list[ReferenceCaption]:
        """All returned captions of one RGB image."""
        pixels = self.processor(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = self.model.generate(
                pixel_values=pixels, return_dict_in_generate=True, output_scores=True, **options
            )
            sequences = [self._trimmed(row.tolist()[1:]) for row in output.sequences]
            if output.get("sequences_scores") is not None:
                scores = output.sequences_scores.tolist()
            else:
                scores = [self._greedy_score(output, sequences[0], **options)]
        return [ReferenceCaption(*pair) for pair in zip(sequences, scores, strict=True)]

    def _trimmed(self, tokens: list[int]) -> tuple[int, ...]:
        ends = [index for index, token in enumerate(tokens) if token in self._end]
        return tuple(tokens[: ends[0] + 1] if ends else tokens)

    def _greedy_score(
        self, output: Any, tokens: tuple[int, ...], length_penalty: float = 1.0, **_: Any
    ) -> float:
        logprobs = [torch.log_softmax(scores[0].float(), dim=-1) for scores in output.scores]
        total = sum(float(row[token]) for row, token in zip(logprobs, tokens, strict=False))
        return float(total / len(tokens) ** length_penalty)


@functools.lru_cache(maxsize=8)
def reference(folder: Path) -> Reference:
    """The reference of a checkpoint folder, loaded once."""
    return Reference(folder)


def picture(seed: int, width: int = 60, height: int = 44) -> Image.Image:
    """An RGB picture with a colour, a gradient and some texture of its own."""
    generator = np.random.default_rng(seed)
    colour, slope = generator.uniform(0, 255, 3), generator.uniform(-128, 128, (2, 3))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    values = colour + y[..., None] * slope[0] + x[..., None] * slope[1]
    values = values + generator.normal(0, 20, values.shape)
    pixels: NDArray[np.uint8] = values.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels)
