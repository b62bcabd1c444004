"""In every precision a caption is the same whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
from captionserve_server.core.engine.scheduler import SchedulerLimits
from captionserve_server.export.precision import Precision
from captionserve_server.local import LocalCaptioner, LocalResult

from tests.conftest import CHECKPOINT_NAMES, QuantisedRepositories
from tests.pictures import pictures

TOGETHER = 64
ALONE = slice(0, TOGETHER, 16)
MOST_DIFFERENCE = 1e-4
WAYS: dict[str, dict[str, Any]] = {"greedy": {"num_beams": 1}, "beams": {"num_beams": 4}}


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_alone_or_among_many_a_caption_is_the_same(
    name: str, precision: Precision, in_precision: QuantisedRepositories
) -> None:
    repository = in_precision(name, precision)
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
