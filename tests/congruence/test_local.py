"""Captions of the edge mode equal the truth, token for token, alone and together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from captionserve import GenerationOptions
from captionserve_server.core.engine.scheduler import SchedulerLimits
from captionserve_server.core.options import DecodingOptions
from captionserve_server.local import LocalCaptioner, LocalResult

from tests.checkpoints import RANDOM_CHECKPOINTS
from tests.congruence.option_grid import IMAGES, OPTION_GRID, client_options
from tests.congruence.test_engine import InProcess
from tests.reference import picture, reference

# The engine is tested with a third of them, the full stack with nearly all.
EVERY = 27
LIMITS = SchedulerLimits(slots=3)
PICTURES = [picture(seed) for seed in range(IMAGES)]

# From all tokens, so that draws of another seed are others.
SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "top_k": 0,
    "temperature": 1.5,
    "num_return_sequences": 3,
    "max_length": 14,
}
SEED = 5
# Each way of decoding once.
ALIKE = {
    "greedy": GenerationOptions(num_beams=1, max_length=14),
    "beams": GenerationOptions(num_beams=4, num_return_sequences=2, max_length=14),
    "groups": GenerationOptions(
        num_beams=4, num_beam_groups=2, diversity_penalty=0.5, max_length=14
    ),
    "forced": GenerationOptions(num_beams=3, force_words=["at"], max_length=14),
    "sampled": GenerationOptions(seed=SEED, **SAMPLING),
}


@pytest.fixture(scope="module")
def captioner(model_repository: Callable[[str], Path]) -> Iterator[Callable[[str], LocalCaptioner]]:
    """Checkpoint name to its captioner in this process."""
    loaded: dict[str, LocalCaptioner] = {}
    with ExitStack() as stack:

        def load(name: str) -> LocalCaptioner:
            if name not in loaded:
                made = LocalCaptioner(model_repository(name), threads=1, limits=LIMITS)
                loaded[name] = stack.enter_context(made)
            return loaded[name]

        yield load


def token_ids(result: LocalResult) -> list[tuple[int, ...]]:
    return [caption.token_ids for caption in result.captions]


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_every_option_equals_the_truth(
    name: str,
    captioner: Callable[[str], LocalCaptioner],
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder(name))
    for number, options in list(enumerate(OPTION_GRID))[::EVERY]:
        image = PICTURES[number % IMAGES]
        result = captioner(name).caption(image, client_options(options))
        expected = truth.captions(image, options)
        assert token_ids(result) == [true.token_ids for true in expected], options
        scores = [caption.score for caption in result.captions]
        assert scores == pytest.approx([true.score for true in expected], abs=1e-3), options
        for caption, true in zip(result.captions, expected, strict=True):
            assert caption.token_logprobs == pytest.approx(true.token_logprobs, abs=2e-3), options


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_without_options_the_checkpoints_own_defaults_apply(
    name: str,
    captioner: Callable[[str], LocalCaptioner],
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder(name))
    expected = [truth.captions(image)[0].token_ids for image in PICTURES]
    results = captioner(name).caption_all(PICTURES)
    assert [result.captions[0].token_ids for result in results] == expected


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
@pytest.mark.parametrize("way", ALIKE)
def test_captions_do_not_depend_on_their_company(
    name: str, way: str, captioner: Callable[[str], LocalCaptioner]
) -> None:
    alone = [captioner(name).caption(image, ALIKE[way]) for image in PICTURES]
    together = captioner(name).caption_all(PICTURES, ALIKE[way])
    assert [token_ids(result) for result in together] == [token_ids(result) for result in alone]
    assert len({result.captions[0].token_ids for result in alone}) > 1


def test_threads_share_the_captioner(captioner: Callable[[str], LocalCaptioner]) -> None:
    local = captioner("projected")
    requests = [(image, options) for options in ALIKE.values() for image in PICTURES]
    alone = [token_ids(local.caption(image, options)) for image, options in requests]
    with ThreadPoolExecutor(len(ALIKE)) as pool:
        results = pool.map(lambda request: local.caption(*request), requests)
        assert [token_ids(result) for result in results] == alone


@pytest.mark.parametrize("name", RANDOM_CHECKPOINTS)
def test_a_seed_draws_what_the_engine_draws(
    name: str,
    captioner: Callable[[str], LocalCaptioner],
    model_repository: Callable[[str], Path],
) -> None:
    options = DecodingOptions(seed=SEED, **SAMPLING)
    drawn = InProcess(model_repository(name)).captions([(image, options) for image in PICTURES])
    results = captioner(name).caption_all(PICTURES, seed=SEED, **SAMPLING)
    assert [token_ids(result) for result in results] == [
        [caption.token_ids for caption in captions] for captions in drawn
    ]


def test_without_a_seed_captions_differ(captioner: Callable[[str], LocalCaptioner]) -> None:
    draws = captioner("projected").caption_all(PICTURES[:1] * 8, **SAMPLING)
    assert len({draw.text for draw in draws}) > 1
