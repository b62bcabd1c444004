"""Judges a trained demo checkpoint on held-out scenes and writes its model card.

    python -m captionserve_server.evaluation.publish --checkpoint DIR

Captions come from transformers' own `generate()`, with the checkpoint's generation defaults.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

from captionserve_server.evaluation.held_out import Split, held_out_scenes
from captionserve_server.evaluation.metrics import EvaluationReport, score_captions

SCENES_PER_SPLIT = 500
EVALUATION_SEED = 0
_BATCH_IMAGES = 50
_SPLITS: tuple[Split, ...] = ("unseen_combinations", "unseen_style")


def caption_images(checkpoint: Path, images: Sequence[Image.Image], num_beams: int) -> list[str]:
    """Caption images with transformers, as the yardstick for every other way of serving them."""
    model: Any = VisionEncoderDecoderModel.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    captions: list[str] = []
    for first in range(0, len(images), _BATCH_IMAGES):
        batch = list(images[first : first + _BATCH_IMAGES])
        pixels = processor(batch, return_tensors="pt").pixel_values
        with torch.inference_mode():
            tokens = model.generate(pixels, num_beams=num_beams)
        captions += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return captions


def evaluate(checkpoint: Path, split: Split, num_beams: int) -> EvaluationReport:
    """Score a checkpoint on the scenes of a split."""
    scenes = list(held_out_scenes(split, SCENES_PER_SPLIT, EVALUATION_SEED))
    return score_captions(
        scenes, caption_images(checkpoint, [scene.image for scene in scenes], num_beams)
    )


def write_card(checkpoint: Path) -> None:
    """Write the checkpoint's README.md from its template, its figures and its training log."""
    reports = {
        f"{split.replace('_', ' ')}, {beams} beam{'s' * (beams > 1)}": evaluate(
            checkpoint, split, beams
        )
        for split in _SPLITS
        for beams in (4, 1)
    }
    template = (files(__package__) / "model_card.md").read_text(encoding="utf-8")
    card = template.replace("{{figures}}", _figures_table(reports))
    card = card.replace("{{training}}", _training_table(checkpoint / "training_log.jsonl"))
    card = card.replace("{{parameters}}", _parameters(checkpoint))
    card = card.replace("{{machine}}", f"{platform.machine()}, torch {torch.__version__}")
    (checkpoint / "README.md").write_text(card, encoding="utf-8")


def _parameters(checkpoint: Path) -> str:
    model = VisionEncoderDecoderModel.from_pretrained(checkpoint, dtype=torch.float32)
    return f"{model.num_parameters() / 1e6:.1f} million"


def _figures_table(reports: dict[str, EvaluationReport]) -> str:
    names = [field.name for field in fields(EvaluationReport)]
    lines = ["| | " + " | ".join(reports) + " |", "|---" * (1 + len(reports)) + "|"]
    for name in names:
        values = [_as_text(getattr(report, name)) for report in reports.values()]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _as_text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _training_table(log: Path) -> str:
    """Show about ten lines of the log, the last among them."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    stride = -(-len(lines) // 10)
    shown = lines[::-1][::stride][::-1]
    rows = ["| " + " | ".join(key.replace("_", " ") for key in lines[0]) + " |"]
    rows.append("|---" * len(lines[0]) + "|")
    rows += ["| " + " | ".join(str(value) for value in line.values()) + " |" for line in shown]
    return "\n".join(rows)


def main() -> None:
    """Read the command line and write the card."""
    parser = argparse.ArgumentParser(description="Evaluate the demo checkpoint, write its card.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    write_card(parser.parse_args().checkpoint)


if __name__ == "__main__":
    main()
