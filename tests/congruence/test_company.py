"""In every precision a caption is the same whatever else is in the batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from captionserve_server.core.engine.scheduler import SchedulerLimits
from captionserve_server.export.precision import Precision
from captionserve_server.export.quantise import quantise_encoder, quantise_prefill, quantise_step
from captionserve_server.local import LocalCaptioner, LocalResult
from captionserve_server.runtime import model_repository as files

from tests.conftest import CHECKPOINT_NAMES
from tests.pictures import pictures

TOGETHER = 64
ALONE = slice(0, TOGETHER, 16)
MOST_DIFFERENCE = 1e-4
WAYS: dict[str, dict[str, Any]] = {"greedy": {"num_beams": 1}, "beams": {"num_beams": 4}}
QUANTISERS = {
    Path(files.VISION_ENCODER, "1", files.ENCODER_GRAPH_FILE): quantise_encoder,
    Path(files.DECODER, "1", files.PREFILL_GRAPH_FILE): quantise_prefill,
    Path(files.DECODER, "1", files.STEP_GRAPH_FILE): quantise_step,
}


def in_precision(fp32: Path, folder: Path, precision: Precision) -> Path:
    """A model repository with the graphs of another in a precision."""
    if precision is Precision.FP32:
        return fp32
    shutil.copytree(fp32, folder)
    for graph, quantise in QUANTISERS.items():
        quantise(fp32 / graph, folder / graph, precision)
    return folder


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_alone_or_among_many_a_caption_is_the_same(
    name: str,
    precision: Precision,
    model_repository: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    repository = in_precision(model_repository(name), tmp_path / "repository", precision)
    images = pictures(name, TOGETHER)
    with LocalCaptioner(repository, limits=SchedulerLimits(slots=TOGETHER)) as captioner:
        for way, options in WAYS.items():
            together = captioner.caption_all(images, **options)[ALONE]
            alone = [captioner.caption(image, **options) for image in images[ALONE]]
            for one, among in zip(alone, together, strict=True):
                assert _tokens(among) == _tokens(one), way
                assert _scores(among) == pytest.approx(_scores(one), abs=MOST_DIFFERENCE), way


def _tokens(result: LocalResult) -> list[tuple[int, ...]]:
    return [caption.token_ids for caption in result.captions]


def _scores(result: LocalResult) -> list[float]:
    return [caption.score for caption in result.captions]
