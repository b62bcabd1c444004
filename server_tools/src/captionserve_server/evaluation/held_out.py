"""The held-out scenes on which the demo captioner is judged."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from captionserve_server.demo.scenes import Scene, compose_scene, sample_facts
from captionserve_server.demo.splits import TRAINING_STYLES, UNSEEN_STYLE, is_held_out

Split = Literal["unseen_combinations", "unseen_style"]

_STYLES: dict[Split, tuple[str, ...]] = {
    "unseen_combinations": TRAINING_STYLES,
    "unseen_style": (UNSEEN_STYLE,),
}


def held_out_scenes(split: Split, count: int, seed: int) -> Iterator[Scene]:
    """Yield `count` scenes, always the same for a seed.

    Both splits show only combinations that training never saw (see demo/splits.py):
    "unseen_combinations" in the styles of art that training saw, "unseen_style" in another one.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    styles = _STYLES[split]
    for _ in range(count):
        facts = sample_facts(rng, accept=is_held_out)
        yield compose_scene(facts, styles[int(rng.integers(len(styles)))], rng)
