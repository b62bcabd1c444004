"""Bad images and options: each caller is told what is wrong, and the server goes on."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from captionserve import CaptionClient, CaptionError, GenerationOptions
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from captionserve_server.evaluation.held_out import held_out_scenes
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.triton import wire
from captionserve_server.triton.wire import error_of_text
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from tests.conftest import DEMO
from tests.pictures import png
from tests.reference import picture

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


MOST_STATUS_BYTES = 4096


@pytest.mark.parametrize(
    "options",
    [
        caption_pb2.GenerationOptions(
            num_beams=4,
            bad_words=caption_pb2.StringList(values=words),
            force_words=caption_pb2.StringList(values=words),
        )
        for words in (
            [f"{'long' * 24} {number}" for number in range(64)],
            [f"{chr(0x4E2D) * 90} {number}" for number in range(64)],
            [f"{chr(0x1F600) * 90} {number}" for number in range(64)],
        )
    ],
    ids=["letters", "three bytes each", "four bytes each"],
)
def test_an_error_about_long_words_is_short_and_always_the_same(
    service: Service, options: caption_pb2.GenerationOptions
) -> None:
    image = caption_pb2.Image(encoded=png(picture(1)))
    with grpc.insecure_channel(service(DEMO).grpc) as channel:
        stub = caption_pb2_grpc.CaptionServiceStub(channel)
        for _ in range(5):
            with pytest.raises(grpc.RpcError) as caught:
                stub.Caption(caption_pb2.CaptionRequest(image=image, options=options), timeout=60)
            error = caught.value
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            metadata = {entry.key: entry.value for entry in error.trailing_metadata() or ()}
            assert len(metadata["grpc-status-details-bin"]) * 4 / 3 <= MOST_STATUS_BYTES
            assert len((error.details() or "").encode()) <= MOST_STATUS_BYTES


@pytest.mark.parametrize("model", ["captioner", "decoder"])
@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (b"\xff\xfe", {"options"}),
        (b'{"prefix": "\xc3"}', {"options"}),
        (b'{"bad_words": ["\\udfff"]}', {"bad_words"}),
        (b'{"seed": ' + b"9" * 500 + b', "do_sample": true}', {"seed"}),
        (b'{"repetition_penalty": 1e-46}', {"repetition_penalty"}),
        (b'{"x' + b"y" * 100_000 + b'": 1}', None),
    ],
    ids=range(6),
)
def test_who_asks_triton_directly_is_refused_by_field(
    service: Service, model: str, options: bytes, fields: set[str] | None
) -> None:
    with InferenceServerClient(service(DEMO).triton_grpc) as client:
        image = string_input(wire.IMAGE, png(picture(1)))
        answers: list[InferenceServerException | None] = []
        if model == "captioner":
            with pytest.raises(InferenceServerException) as caught:
                client.infer(model, [image, string_input(wire.OPTIONS, options)])
            answers.append(caught.value)
        else:
            client.start_stream(lambda result, error: answers.append(error))
            client.async_stream_infer(model, [image, string_input(wire.OPTIONS, options)])
            client.stop_stream()
    assert answers[0] is not None
    text = answers[0].message()
    error = error_of_text(text)
    assert error is not None
    assert error.reason == "INVALID_OPTIONS"
    assert fields is None or set(error.field_violations) == fields
    assert len(text) <= MOST_STATUS_BYTES


def string_input(spec: wire.TensorSpec, content: bytes) -> InferInput:
    made = InferInput(spec.name, [1], "BYTES")
    made.set_data_from_numpy(np.array([content], np.object_))
    return made


def test_an_id_that_is_no_text_spoils_nothing(service: Service) -> None:
    running = service(DEMO)
    body = (
        b'{"id": "\xff\xfe", "inputs": [{"name": "IMAGE", "datatype": "BYTES", "shape": [1], '
        b'"data": ["no image"]}]}'
    )
    request = urllib.request.Request(
        f"http://{running.triton_http}/v2/models/captioner/infer", body, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    assert "UNSUPPORTED_IMAGE_FORMAT" in caught.value.read().decode(errors="replace")
    with CaptionClient(running.grpc, timeout=TIMEOUT_SECONDS) as client:
        assert client.caption(picture(1), bypass_cache=True).text
