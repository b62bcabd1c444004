"""Captions through client, gateway and Triton equal transformers' generate(), token for token."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from captionserve import CaptionClient, CaptionResult, GenerationOptions
from captionserve_server.core.options import DecodingOptions
from captionserve_server.demo.scenes import Scene
from captionserve_server.evaluation.held_out import held_out_scenes
from captionserve_server.serving.ready import ReadyReport
from PIL import Image

from tests.checkpoints import RANDOM_CHECKPOINTS
from tests.conftest import CHECKPOINT_NAMES, DEMO
from tests.congruence.option_grid import OPTION_GRID, generate_options
from tests.reference import ReferenceCaption, picture, reference

IN_FLIGHT = 16
TIMEOUT_SECONDS = 120.0

Request = tuple[Image.Image, DecodingOptions]


def pictures(name: str, count: int) -> list[Image.Image]:
    """Pictures that the checkpoint has something to say about."""
    if name == DEMO:
        scenes: list[Scene] = list(held_out_scenes("unseen_combinations", count, seed=77))
        return [scene.image for scene in scenes]
    return [picture(seed) for seed in range(count)]


def caption_all(target: str, requests: list[Request]) -> list[CaptionResult]:
    """All requests with many in flight, answers in their order."""
    with (
        CaptionClient(target, timeout=TIMEOUT_SECONDS) as client,
        ThreadPoolExecutor(IN_FLIGHT) as pool,
    ):
        return list(
            pool.map(
                # The client's options are named and written as generate()'s.
                lambda pair: client.caption(
                    pair[0], GenerationOptions(**generate_options(pair[1]))
                ),
                requests,
            )
        )


def assert_equal(result: CaptionResult, expected: list[ReferenceCaption], about: object) -> None:
    assert [caption.token_ids for caption in result.captions] == [e.token_ids for e in expected], (
        about
    )
    scores = [caption.score for caption in result.captions]
    assert scores == pytest.approx([e.score for e in expected], abs=1e-3), about


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_every_option_equals_generate(
    name: str,
    service: Callable[[str], ReadyReport],
    checkpoint_folder: Callable[[str], Path],
) -> None:
    requests = [(image, options) for options in OPTION_GRID for image in pictures(name, 2)]
    random.Random(1).shuffle(requests)
    truth = reference(checkpoint_folder(name))

    results = caption_all(service(name).grpc, requests)

    for (image, options), result in zip(requests, results, strict=True):
        assert_equal(result, truth.captions(image, **generate_options(options)), options)


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_without_options_the_checkpoints_own_defaults_apply(
    name: str,
    service: Callable[[str], ReadyReport],
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder(name))
    with CaptionClient(service(name).grpc, timeout=TIMEOUT_SECONDS) as client:
        for image in pictures(name, 3):
            tokens = client.caption(image).captions[0].token_ids
            assert tokens == truth.captions(image)[0].token_ids


def test_captions_of_random_checkpoints_tell_images_apart(
    service: Callable[[str], ReadyReport],
) -> None:
    # Else the tests above would compare one caption with itself.
    for name in RANDOM_CHECKPOINTS:
        options = DecodingOptions(num_beams=2, max_length=14)
        results = caption_all(service(name).grpc, [(image, options) for image in pictures(name, 8)])
        assert len({result.captions[0].token_ids for result in results}) >= 4, name


def test_the_text_is_what_the_checkpoints_tokenizer_says(
    service: Callable[[str], ReadyReport], checkpoint_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint_folder(DEMO))
    with CaptionClient(service(DEMO).grpc) as client:
        for image in pictures(DEMO, 4):
            caption = client.caption(image).captions[0]
            expected = tokenizer.decode(caption.token_ids, skip_special_tokens=True).strip()
            assert caption.text == expected
            assert caption.text
