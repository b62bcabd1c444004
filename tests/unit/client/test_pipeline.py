"""The pipeline before a real gRPC server: what it adds to agreeing with transformers."""

from __future__ import annotations

import base64
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from types import GeneratorType
from typing import Any

import grpc
import numpy as np
import pytest
from captionserve import CaptionError, _pipeline, pipeline
from captionserve.v1 import caption_pb2

from tests.unit.client.caption_server import (
    WAIT_SECONDS,
    RecordingServicer,
    abort,
    rich_status,
    window,
)

Server = tuple[str, RecordingServicer]
Requests = Iterator[caption_pb2.CaptionManyRequest]
Responses = Iterator[caption_pb2.CaptionManyResponse]


def text_of(content: bytes) -> str:
    """An image file as text; the server of the tests captions it with its content."""
    return base64.b64encode(content).decode()


def captions(*texts: str) -> list[list[dict[str, str]]]:
    """What a list of images is answered with: the server gives each two captions."""
    return [[{"generated_text": text}, {"generated_text": "an apple"}] for text in texts]


def test_one_image_is_one_call_of_the_first_turn(server: Server) -> None:
    target, servicer = server
    with pipeline("image-to-text", model=target) as pipe:
        assert [*captions("a red apple")] == [pipe(text_of(b"file"))]
    assert [request.image.encoded for request in servicer.requests] == [b"file"]


def test_options_of_the_call_come_before_the_pipelines(server: Server) -> None:
    target, servicer = server
    kwargs = {"num_beams": 3, "length_penalty": 2.0}
    with pipeline(model=target, max_new_tokens=9, generate_kwargs=kwargs) as pipe:
        pipe(text_of(b"file"), max_new_tokens=7, generate_kwargs={"num_beams": 2})
        pipe(text_of(b"file"))
    first, second = (request.options for request in servicer.requests)
    assert (first.max_new_tokens, first.num_beams, first.length_penalty) == (7, 2, 2.0)
    assert (second.max_new_tokens, second.num_beams, second.length_penalty) == (9, 3, 2.0)


def test_a_generator_in_is_a_generator_out_and_as_lazy(server: Server) -> None:
    target, servicer = server
    pulled = itertools.count()

    def images() -> Iterator[str]:
        while True:
            yield text_of(f"image {next(pulled)}".encode())

    with pipeline(model=target) as pipe:
        results = pipe(images())
        assert isinstance(results, GeneratorType)
        assert next(pulled) == 0
        assert [next(results), next(results)] == captions("image 1", "image 2")
        results.close()
    assert next(pulled) < 40
    assert not servicer.requests


def test_a_result_does_not_wait_for_the_next_image(server: Server) -> None:
    seen = threading.Event()

    def images() -> Iterator[str]:
        yield text_of(b"first")
        assert seen.wait(WAIT_SECONDS)
        yield text_of(b"second")

    with pipeline(model=server[0]) as pipe:
        results = pipe(images())
        first = next(results)
        seen.set()
        assert [first, *results] == captions("first", "second")


def test_so_many_are_under_way_as_the_batch_has(server: Server) -> None:
    target, servicer = server
    size = 40

    def together(requests: Requests, context: grpc.ServicerContext) -> Responses:
        yield window(items=size)
        for item in list(itertools.islice(requests, size)):
            response = caption_pb2.CaptionResponse(captions=[caption_pb2.Caption(text="one")])
            result = caption_pb2.ItemResult(id=item.id, response=response)
            yield caption_pb2.CaptionManyResponse(result=result)

    servicer.many = together
    with pipeline(model=target) as pipe:
        assert len(pipe([text_of(b"file")] * size, batch_size=size)) == size


def test_threads_read_the_images_of_a_list_in_order(server: Server, tmp_path: Path) -> None:
    started = threading.Barrier(2)

    class Items:
        def __len__(self) -> int:
            return 6

        def __getitem__(self, place: int) -> str:
            # Nobody comes through alone.
            started.wait(WAIT_SECONDS)
            return text_of(f"image {place}".encode())

    with pipeline(model=server[0]) as pipe:
        results = pipe(Items(), num_workers=2)
        assert len(results) == 6
        assert list(results) == captions(*(f"image {place}" for place in range(6)))


def test_an_error_of_a_thread_comes_when_it_is_its_turn(server: Server) -> None:
    with pipeline(model=server[0]) as pipe:

        class Items:
            def __len__(self) -> int:
                return 4

            def __getitem__(self, place: int) -> str:
                return text_of(b"good") if place < 2 else "no such file"

        results = iter(pipe(Items(), num_workers=3))
        assert [next(results), next(results)] == captions("good", "good")
        with pytest.raises(ValueError, match="must be the path of a file"):
            next(results)


def test_nothing_is_fetched_unless_it_is_allowed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def content(url: str, seconds: float | None) -> bytes:
        return f"{url} in {seconds}".encode()

    target, servicer = server
    monkeypatch.setattr(_pipeline, "fetch", content)
    with pipeline(model=target) as pipe:
        with pytest.raises(ValueError, match="allow_urls=True"):
            pipe("http://a.example/b.png")
        pipe("http://a.example/b.png", allow_urls=True, timeout=3)
    with pipeline(model=target, allow_urls=True) as pipe:
        pipe("https://a.example/b.png")
        with pytest.raises(ValueError, match="allow_urls=True"):
            pipe("https://a.example/b.png", allow_urls=False)
    assert [request.image.encoded for request in servicer.requests] == [
        b"http://a.example/b.png in 3",
        b"https://a.example/b.png in None",
    ]


def test_pixel_values_are_one_image_and_a_batch_is_several(server: Server) -> None:
    target, servicer = server
    servicer.many = servicer.answer_each
    batch = np.arange(72, dtype=np.float32).reshape(2, 3, 3, 4)
    apple = captions("a red apple")[0]
    with pipeline(model=target) as pipe:
        assert pipe(batch[0]) == apple
        assert pipe(batch) == [apple, apple]
        assert pipe([batch, batch[0]]) == [apple] * 3
        assert list(pipe(each for each in (batch, batch[1]))) == [apple] * 3
        assert pipe(batch[:0]) == []
    sent = [np.frombuffer(each.image.pixel_values.values, "<f4") for each in servicer.requests]
    for values, place in zip(sent, [0, 0, 1, 0, 1, 0, 0, 1, 1], strict=True):
        np.testing.assert_array_equal(values, batch[place].ravel())


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.uint8), np.zeros(3, np.int64)])
def test_other_arrays_are_refused(server: Server, array: Any) -> None:
    with pipeline(model=server[0]) as pipe, pytest.raises(TypeError, match="is ndarray"):
        pipe(array)


def test_what_transformers_has_no_name_for_is_the_clients_error(server: Server) -> None:
    target, servicer = server

    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        code = grpc.StatusCode.UNAUTHENTICATED
        abort(context, code, rich_status(code))

    servicer.answer = refuse
    with pipeline(model=target) as pipe, pytest.raises(CaptionError) as caught:
        pipe(text_of(b"file"))
    assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_an_option_of_a_wrong_type_is_named(server: Server) -> None:
    with pipeline(model=server[0]) as pipe, pytest.raises(ValueError, match="num_beams: must be"):
        pipe(text_of(b"file"), generate_kwargs={"num_beams": "four"})


def test_another_task_or_no_model_is_refused() -> None:
    with pytest.raises(KeyError, match="must be image-to-text"):
        pipeline("text-generation", model="127.0.0.1:9000")
    with pytest.raises(RuntimeError, match="no default model"):
        pipeline("image-to-text")
    misspelled: Any = pipeline
    with pytest.raises(TypeError, match="device"):
        misspelled("image-to-text", model="127.0.0.1:9000", device=0)
    with pytest.raises(ValueError, match="max_new_tokens is given both"):
        pipeline(model="127.0.0.1:9000", max_new_tokens=1, generate_kwargs={"max_new_tokens": 1})


def test_a_closed_pipeline_answers_no_more(server: Server) -> None:
    with pipeline(model=server[0]) as pipe:
        pipe(text_of(b"file"))
    with pytest.raises(CaptionError, match="CLIENT_CLOSED"):
        pipe(text_of(b"file"))
