"""Bad images and options: each caller is told what is wrong, and the server goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from captionserve import CaptionClient, CaptionError, GenerationOptions
from captionserve_server.evaluation.held_out import held_out_scenes
from captionserve_server.serving.ready import ReadyReport

from tests.conftest import DEMO

TIMEOUT_SECONDS = 120.0

Service = Callable[[str], ReadyReport]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "IMAGE_CORRUPT"),
        (b"this is a text file\n", "UNSUPPORTED_IMAGE_FORMAT"),
        (b"\x89PNG\r\n\x1a\n damaged", "IMAGE_CORRUPT"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF cut", "IMAGE_CORRUPT"),
    ],
)
def test_a_bad_file_is_refused_and_the_server_goes_on(
    service: Service, content: bytes, reason: str
) -> None:
    scene = next(held_out_scenes("unseen_combinations", 1, seed=7))
    with CaptionClient(service(DEMO).grpc) as client:
        with pytest.raises(CaptionError) as caught:
            client.caption(content)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.reason == reason
        assert "/" not in caught.value.message
        assert "Traceback" not in caught.value.message
        assert client.caption(scene.image).text


def test_bad_images_spoil_no_neighbour(service: Service) -> None:
    scenes = list(held_out_scenes("unseen_combinations", 12, seed=8))

    def attempt(number: int) -> str:
        with CaptionClient(service(DEMO).grpc, timeout=TIMEOUT_SECONDS) as client:
            try:
                bad = number % 3 == 0
                return client.caption(b"bad" if bad else scenes[number].image).text
            except CaptionError as error:
                return error.reason

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(attempt, range(12)))
    assert answers[::3] == ["UNSUPPORTED_IMAGE_FORMAT"] * 4
    assert "UNSUPPORTED_IMAGE_FORMAT" not in answers[1::3] + answers[2::3]


def test_wrong_options_are_all_named(service: Service) -> None:
    scene = next(held_out_scenes("unseen_combinations", 1, seed=9))
    options = GenerationOptions(num_beams=0, max_length=5000, length_penalty=float("nan"))
    with CaptionClient(service(DEMO).grpc) as client, pytest.raises(CaptionError) as caught:
        client.caption(scene.image, options)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert set(caught.value.field_violations) == {
        "options.num_beams",
        "options.max_length",
        "options.length_penalty",
    }
