"""Writes the sample pictures of the demo, with the captions they should get.

python -m captionserve_server.demo.samples --output demo/images

Every sample shows a combination of facts that training never saw. Run it again and the same
pictures come out, byte for byte with the same Pillow.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captionserve_server.demo.captions import parse_caption
from captionserve_server.demo.scenes import compose_scene
from captionserve_server.demo.splits import TRAINING_STYLES, is_held_out

_SEED = 2026


@dataclass(frozen=True)
class Sample:
    """One picture to write: its file's name tells the format, `side_pixels` the size."""

    file_name: str
    caption: str
    style: str
    side_pixels: int


_NOTO, _TWEMOJI = TRAINING_STYLES

SAMPLES: tuple[Sample, ...] = (
    Sample("penguin.jpg", "a penguin below a dog face on a red background", _NOTO, 640),
    Sample("crown.png", "a crown to the left of a yellow heart on a red background", _TWEMOJI, 320),
    Sample(
        "book.webp", "a watermelon to the right of a green book on a black background", _NOTO, 480
    ),
    Sample("sunflower.jpg", "a sunflower below a banana on a green background", _TWEMOJI, 1000),
    Sample("balloon.png", "a green balloon above a penguin on a yellow background", _NOTO, 210),
    Sample("rabbit.webp", "a carrot to the left of a rabbit face on a gray background", _NOTO, 800),
    Sample("elephant.jpg", "an elephant on a green background", _TWEMOJI, 400),
)


def write_samples(output: Path) -> None:
    """Write the pictures, and `captions.json` with the true caption of each."""
    output.mkdir(parents=True, exist_ok=True)
    for position, sample in enumerate(SAMPLES):
        _write(sample, output, np.random.default_rng([_SEED, position]))
    captions = {sample.file_name: sample.caption for sample in SAMPLES}
    text = json.dumps(captions, indent=2) + "\n"
    (output / "captions.json").write_text(text, encoding="utf-8")


def _write(sample: Sample, output: Path, rng: np.random.Generator) -> None:
    facts = parse_caption(sample.caption)
    if facts is None or not is_held_out(facts):
        raise ValueError(f"{sample.caption!r} does not state held-out facts")
    scene = compose_scene(facts, sample.style, rng, side_pixels=sample.side_pixels)
    scene.image.save(output / sample.file_name, quality=90)


def main() -> None:
    """Read the command line and write the samples."""
    parser = argparse.ArgumentParser(description="Write the demo's sample pictures.")
    parser.add_argument("--output", type=Path, required=True)
    write_samples(parser.parse_args().output)


if __name__ == "__main__":
    main()
