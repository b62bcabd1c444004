"""Captions through client, gateway and Triton equal the truth, token for token."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captionserve import CaptionClient, CaptionResult
from captionserve_server.core.options import DecodingOptions
from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.triton import wire
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferInput

from tests.checkpoints import RANDOM_CHECKPOINTS
from tests.conftest import CHECKPOINT_NAMES, DEMO, Repositories
from tests.congruence.option_grid import IMAGES, OPTION_GRID, as_json, client_options
from tests.pictures import pictures, png
from tests.reference import ReferenceCaption, reference

IN_FLIGHT = 64
TIMEOUT_SECONDS = 120.0
# Its graphs are tested with more of the grid, in one process; see congruence/test_engine.py.
EVERY_OF_TORCHSCRIPT = 3
EVERY_OF_DEMO = 2

Request = tuple[Image.Image, DecodingOptions]
GridRequests = Callable[[str], list[Request]]
OneByOne = Callable[[str], list[CaptionResult]]


@pytest.fixture(scope="module")
def grid_requests(request: pytest.FixtureRequest) -> GridRequests:
    """Checkpoint name to what is asked of it: options of the grid, with images in turns.

    `make soak-options` asks four of five, more than 300. Else it is half of them of the demo, and a
    smaller part of random weights: test_engine.py asks more of them in one process.
    """
    every = request.config.getoption("--soak-options")

    def requests(name: str) -> list[Request]:
        images = pictures(name, IMAGES)
        asked = [
            (images[number % IMAGES], options)
            for number, options in enumerate(OPTION_GRID)
            if number % 5
        ]
        return asked[:: min(every, EVERY_OF_DEMO) if name == DEMO else every]

    return requests


@pytest.fixture(scope="module")
def one_by_one(service: Callable[[str], ReadyReport], grid_requests: GridRequests) -> OneByOne:
    """Checkpoint name to the answers to its requests, each asked for when the last was there."""
    answered: dict[str, list[CaptionResult]] = {}

    def results(name: str) -> list[CaptionResult]:
        if name not in answered:
            answered[name] = caption_all(service(name).grpc, grid_requests(name), in_flight=1)
        return answered[name]

    return results


def caption_all(
    target: str, requests: list[Request], *, in_flight: int, streams: bool = False
) -> list[CaptionResult]:
    """All requests, so many at a time; answers in their order, none from the cache.

    Args:
        target: the service.
        requests: what is asked.
        in_flight: how many at a time.
        streams: whether every third is asked for as a stream.
    """

    def answer(number: int) -> CaptionResult:
        image, options = requests[number][0], client_options(requests[number][1])
        if not streams or number % 3:
            return client.caption(image, options, bypass_cache=True)
        *_, last = client.caption_stream(image, options)
        assert last.result is not None
        return last.result

    with (
        CaptionClient(target, timeout=TIMEOUT_SECONDS) as client,
        ThreadPoolExecutor(in_flight) as pool,
    ):
        return list(pool.map(answer, range(len(requests))))


def token_ids(result: CaptionResult) -> list[tuple[int, ...]]:
    return [caption.token_ids for caption in result.captions]


def assert_close(
    result: CaptionResult, expected: list[ReferenceCaption], options: DecodingOptions
) -> None:
    """Scores and log-probabilities are the true ones, but for rounding."""
    scores = [caption.score for caption in result.captions]
    assert scores == pytest.approx([true.score for true in expected], abs=1e-3), options
    for caption, true in zip(result.captions, expected, strict=True):
        assert caption.token_logprobs == pytest.approx(true.token_logprobs, abs=2e-3), options


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_every_option_equals_the_truth(
    name: str,
    grid_requests: GridRequests,
    one_by_one: OneByOne,
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder(name))
    for (image, options), result in zip(grid_requests(name), one_by_one(name), strict=True):
        expected = truth.captions(image, options)
        assert token_ids(result) == [true.token_ids for true in expected], options
        assert_close(result, expected, options)


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_captions_do_not_depend_on_their_company(
    name: str,
    service: Callable[[str], ReadyReport],
    grid_requests: GridRequests,
    one_by_one: OneByOne,
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder(name))
    alone = list(zip(grid_requests(name), one_by_one(name), strict=True))
    random.Random(1).shuffle(alone)

    requests = [request for request, _ in alone]
    together = caption_all(service(name).grpc, requests, in_flight=IN_FLIGHT, streams=True)

    for ((image, options), one), result in zip(alone, together, strict=True):
        assert token_ids(result) == token_ids(one), options
        assert_close(result, truth.captions(image, options), options)


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_tritons_own_client_gets_the_same_with_options_in_json(
    name: str,
    service: Callable[[str], ReadyReport],
    grid_requests: GridRequests,
    one_by_one: OneByOne,
) -> None:
    with (
        InferenceServerClient(service(name).triton_grpc) as triton,
        ThreadPoolExecutor(IN_FLIGHT) as pool,
    ):

        def tokens(request: Request) -> list[tuple[int, ...]]:
            inputs = []
            for spec, value in ((wire.IMAGE, png(request[0])), (wire.OPTIONS, as_json(request[1]))):
                tensor = InferInput(spec.name, [1], "BYTES")
                tensor.set_data_from_numpy(np.array([value], np.object_))
                inputs.append(tensor)
            rows = triton.infer(wire.CAPTIONER.name, inputs).as_numpy("TOKEN_IDS")
            return [tuple(row[row != wire.PADDING_TOKEN_ID].tolist()) for row in rows]

        found = list(pool.map(tokens, grid_requests(name)))
    assert found == [token_ids(result) for result in one_by_one(name)]


def test_torchscript_serves_the_same_captions(
    model_repository: Repositories,
    grid_requests: GridRequests,
    checkpoint_folder: Callable[[str], Path],
) -> None:
    name = "projected"
    truth = reference(checkpoint_folder(name))
    requests = grid_requests(name)[::EVERY_OF_TORCHSCRIPT]
    with launched_service(model_repository(name, GraphFormat.TORCHSCRIPT)) as served:
        results = caption_all(served.grpc, requests, in_flight=IN_FLIGHT)
    for (image, options), result in zip(requests, results, strict=True):
        expected = truth.captions(image, options)
        assert token_ids(result) == [true.token_ids for true in expected], options
        assert_close(result, expected, options)


@pytest.mark.parametrize("name", CHECKPOINT_NAMES)
def test_without_options_the_checkpoints_own_defaults_apply(
    name: str,
    service: Callable[[str], ReadyReport],
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder(name))
    with CaptionClient(service(name).grpc, timeout=TIMEOUT_SECONDS) as client:
        for image in pictures(name, 3):
            tokens = client.caption(image, bypass_cache=True).captions[0].token_ids
            assert tokens == truth.captions(image)[0].token_ids


def test_captions_of_random_checkpoints_tell_images_apart(
    service: Callable[[str], ReadyReport],
) -> None:
    # Else the tests above would compare one caption with itself.
    for name in RANDOM_CHECKPOINTS:
        options = DecodingOptions(num_beams=2, max_length=14)
        requests = [(image, options) for image in pictures(name, 8)]
        results = caption_all(service(name).grpc, requests, in_flight=IN_FLIGHT)
        assert len({result.captions[0].token_ids for result in results}) >= 4, name


def test_the_text_is_what_the_checkpoints_tokenizer_says(
    service: Callable[[str], ReadyReport], checkpoint_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint_folder(DEMO))
    with CaptionClient(service(DEMO).grpc) as client:
        for image in pictures(DEMO, 4):
            caption = client.caption(image, bypass_cache=True).captions[0]
            expected = tokenizer.decode(caption.token_ids, skip_special_tokens=True).strip()
            assert caption.text == expected
            assert caption.text
