"""The requests that perf_analyzer sends."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from captionserve_server.bench.perf_input import REQUESTS, input_data, scene_images
from PIL import Image

IMAGES = [b"first", b"second one"]


def entries(*arguments: Any, **more: Any) -> list[dict[str, Any]]:
    """The data of an input file, after its way through JSON."""
    content: dict[str, list[dict[str, Any]]] = json.loads(
        json.dumps(input_data(*arguments, **more))
    )
    return content["data"]


def test_images_are_strings_of_triton_and_taken_in_turn() -> None:
    sent = [base64.b64decode(entry["IMAGE"]["b64"]) for entry in entries(IMAGES, {}, 5)]
    assert sent[0] == b"\x05\0\0\0first"
    assert sent[1] == b"\x0a\0\0\0second one"
    assert sent[2:] == [sent[0], sent[1], sent[0]]


def test_no_two_requests_are_alike() -> None:
    nonces = [tuple(entry["NONCE"]) for entry in entries(IMAGES, {})]
    assert len(nonces) == len(set(nonces)) == REQUESTS


def test_options_go_by_the_names_of_their_tensors() -> None:
    (entry,) = entries(IMAGES, {"num_beams": 4, "max_length": 17}, 1)
    assert entry["NUM_BEAMS"] == [4]
    assert entry["MAX_LENGTH"] == [17]
    with pytest.raises(KeyError):
        input_data(IMAGES, {"beams": 4})


def test_scenes_are_jpeg_files_and_the_same_each_time() -> None:
    images = list(scene_images(3))
    assert images == list(scene_images(3))
    assert len(set(images)) == 3
    for image in images:
        assert Image.open(io.BytesIO(image)).format == "JPEG"
