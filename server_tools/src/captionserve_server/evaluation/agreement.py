"""How well the captions of a quantised model agree with those of the same model in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from captionserve_server.evaluation.held_out import Split, held_out_scenes
from captionserve_server.evaluation.metrics import cider_d
from captionserve_server.local import LocalCaptioner

_NUM_BEAMS = 4
_SEED = 1
_SPLITS: tuple[Split, ...] = ("unseen_combinations", "unseen_style")


@dataclass(frozen=True)
class Agreement:
    """Agreement over the held-out scenes of the demo, half of them in the unseen style.

    Attributes:
        images: how many were captioned.
        same_captions: share of captions that are the same word for word, 0..1.
        cider_d: corpus CIDEr-D with the fp32 captions as the true ones, 0..10.
        cider_d_of_fp32: what the fp32 captions themselves reach; less than 10 where some are short.
    """

    images: int
    same_captions: float
    cider_d: float
    cider_d_of_fp32: float


def caption_agreement(fp32: Path, quantised: Path, images: int) -> Agreement:
    """Caption the same scenes with both models, by 4 beams and the checkpoint's other options.

    Args:
        fp32: model repository.
        quantised: model repository.
        images: how many scenes; at least one.
    """
    scenes = [
        scene.image
        for split in _SPLITS
        for scene in held_out_scenes(split, -(-images // len(_SPLITS)), _SEED)
    ][:images]
    true, said = _captions(fp32, scenes), _captions(quantised, scenes)
    same = sum(one == other for one, other in zip(true, said, strict=True))
    return Agreement(
        images=len(scenes),
        same_captions=same / len(scenes),
        cider_d=cider_d(said, true),
        cider_d_of_fp32=cider_d(true, true),
    )


def _captions(repository: Path, images: Sequence[Image.Image]) -> list[str]:
    with LocalCaptioner(repository) as captioner:
        return [result.text for result in captioner.caption_all(images, num_beams=_NUM_BEAMS)]
