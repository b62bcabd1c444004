"""Streams, cache, coalescing, deadlines, attention and slots through client, gateway and Triton."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from captionserve import (
    CaptionClient,
    CaptionError,
    CaptionResult,
    CaptionUpdate,
    FinishReason,
    GenerationOptions,
)
from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.triton import wire
from PIL import Image
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult

from tests.conftest import DEMO
from tests.pictures import pictures, png
from tests.reference import picture, reference
from tests.scraped import total

WAIT_SECONDS = 60.0
LONG = GenerationOptions(num_beams=8, max_length=38, min_length=38)


@pytest.fixture
def demo(service: Callable[[str], ReadyReport]) -> ReadyReport:
    return service(DEMO)


def metric(service: ReadyReport, name: str, **labels: str) -> float:
    """The sum of a metric of Triton over all samples with the labels."""
    return total(service.triton_metrics, name, **labels)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def encoded_once_idle(service: ReadyReport) -> float:
    """Images encoded so far, by Triton's own count, when none of earlier tests is under way."""
    with CaptionClient(service.grpc, timeout=WAIT_SECONDS) as client:
        # Requests are taken in by their order: those before this one are encoded, or gone.
        client.caption(picture(1), bypass_cache=True)
    return metric(service, "nv_inference_count", model="vision_encoder")


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(num_beams=1),
        GenerationOptions(num_beams=4),
        GenerationOptions(do_sample=True, seed=3),
        GenerationOptions(num_beams=3, prefix="a red", num_return_sequences=2),
    ],
    ids=str,
)
def test_a_stream_is_the_caption_in_parts(demo: ReadyReport, options: GenerationOptions) -> None:
    (image,) = pictures(DEMO, 1)
    with CaptionClient(demo.grpc, timeout=WAIT_SECONDS) as client:
        *parts, last = client.caption_stream(image, options)
        whole = client.caption(image, options, bypass_cache=True)
    assert all(part.result is None for part in parts)
    assert last.result is not None
    assert not last.result.cached
    assert last.result.captions == whole.captions
    assert "".join(part.text for part in parts) == whole.text
    tokens = tuple(itertools.chain.from_iterable(part.token_ids for part in parts))
    assert tokens == whole.captions[0].token_ids
    if options.num_beams in (None, 1):
        assert [len(part.token_ids) for part in parts] == [1] * len(tokens)


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(num_beams=1),
        GenerationOptions(num_beams=4, num_return_sequences=3),
        GenerationOptions(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
        GenerationOptions(num_beams=4, force_words=["red"], prefix="a"),
        GenerationOptions(num_beams=4, rerank="grounding"),
        GenerationOptions(do_sample=True, seed=3, num_return_sequences=3),
    ],
    ids=str,
)
def test_a_stream_tells_of_its_search_step_by_step(
    demo: ReadyReport, options: GenerationOptions
) -> None:
    (image,) = pictures(DEMO, 1)
    asked = dataclasses.replace(options, output_beams=True)
    with CaptionClient(demo.grpc, timeout=WAIT_SECONDS) as client:
        # Of what is remembered a stream tells as of anything else.
        whole = client.caption(image, asked)
        *parts, last = client.caption_stream(image, asked)
        silent = list(client.caption_stream(image, options))
    assert last.result is not None
    assert last.result.beams is not None
    assert whole.beams is not None
    steps = tuple(itertools.chain.from_iterable(part.beam_steps for part in parts))
    assert steps == last.result.beams.steps
    assert len(steps) == len(whole.beams.steps)
    # Each came when it was made, and not with the others.
    assert all(len(part.beam_steps) <= 1 for part in parts)
    assert (last.text, last.token_ids, last.beam_steps) == ("", (), ())
    assert "".join(part.text for part in parts) == last.result.text
    assert all(part.beam_steps == () for part in silent)


def test_words_come_one_by_one_and_the_slot_is_given_back(
    service: Callable[[str], ReadyReport],
) -> None:
    running = service("projected")
    with CaptionClient(running.grpc, timeout=WAIT_SECONDS) as client:
        stream = client.caption_stream(picture(1), GenerationOptions(max_length=40, min_length=40))
        updates: list[CaptionUpdate] = list(stream)
    assert len(updates) == 40
    assert all(len(update.token_ids) == 1 for update in updates[:-1])
    wait_until(lambda: metric(running, "captionserve_slots_used") == 0)


def test_leaving_a_stream_frees_its_slot(service: Callable[[str], ReadyReport]) -> None:
    running = service("projected")
    with CaptionClient(running.grpc, timeout=WAIT_SECONDS) as client:
        for _ in range(5):
            for _ in client.caption_stream(picture(1), LONG):
                break
    wait_until(lambda: metric(running, "captionserve_slots_used") == 0)


def test_a_repeated_request_is_answered_from_the_cache(demo: ReadyReport) -> None:
    image = picture(4711)
    options = GenerationOptions(num_beams=3, bad_words=["red"])
    with CaptionClient(demo.grpc, timeout=WAIT_SECONDS) as client:
        first = client.caption(image, options)
        again = client.caption(image, options)
        other = client.caption(image, GenerationOptions(num_beams=3, bad_words=["blue"]))
        anew = client.caption(image, options, bypass_cache=True)
    assert not first.cached
    assert again.cached
    assert again.captions == first.captions
    assert not other.cached
    assert not anew.cached
    assert anew.captions == first.captions


@pytest.mark.parametrize(
    ("options", "cached"),
    [
        (GenerationOptions(do_sample=True, seed=1, num_return_sequences=4), True),
        (GenerationOptions(do_sample=True, num_return_sequences=4), False),
    ],
)
def test_sampling_is_cached_with_a_seed_only(
    demo: ReadyReport, options: GenerationOptions, cached: bool
) -> None:
    image = picture(4712)
    with CaptionClient(demo.grpc, timeout=WAIT_SECONDS) as client:
        client.caption(image, options)
        second = client.caption(image, options)
    assert second.cached == cached


def test_the_same_straight_at_triton(demo: ReadyReport) -> None:
    (image,) = pictures(DEMO, 1)
    written = b'{"num_beams": 3, "early_stopping": "never", "output_beams": true}'
    inputs = [
        tensor(wire.IMAGE, np.array([png(image)], np.object_)),
        tensor(wire.OPTIONS, np.array([written], np.object_)),
    ]
    options = GenerationOptions(num_beams=3, early_stopping="never", output_beams=True)
    with CaptionClient(demo.grpc, timeout=WAIT_SECONDS) as client:
        expected = client.caption(image, options)
    assert expected.beams is not None
    with InferenceServerClient(demo.triton_grpc) as triton:
        answer = triton.infer(wire.CAPTIONER.name, inputs)
        assert answer.as_numpy("TEXT").tolist() == [expected.text.encode()]
        tokens = tuple(answer.as_numpy("TOKEN_IDS")[0].tolist())
        assert tokens == expected.captions[0].token_ids
        answers: queue.Queue[tuple[InferResult | None, Exception | None]] = queue.Queue()
        triton.start_stream(lambda result, error: answers.put((result, error)))
        triton.async_stream_infer(wire.CAPTIONER_STREAM.name, inputs)
        parts: list[bytes] = []
        steps: list[dict[str, list[Any]]] = []
        while True:
            result, error = answers.get(timeout=WAIT_SECONDS)
            assert error is None
            assert result is not None
            if result.get_output("TEXT") is not None:
                break
            parts += result.as_numpy("NEW_TEXT").tolist()
            steps += json.loads(result.as_numpy("NEW_BEAM_STEPS")[0])
        assert b"".join(parts) == expected.text.encode()
        assert [step["token_ids"] for step in steps] == [
            [each.token_id for each in step] for step in expected.beams.steps
        ]
        assert steps == json.loads(result.as_numpy("BEAMS")[0])["steps"]


def test_a_caller_that_leaves_a_front_frees_its_slot(
    service: Callable[[str], ReadyReport],
) -> None:
    running = service("deit")
    options = b'{"num_beams": 8, "max_length": 38, "min_length": 38}'
    inputs = [
        tensor(wire.IMAGE, np.array([png(picture(1))], np.object_)),
        tensor(wire.OPTIONS, np.array([options], np.object_)),
    ]
    with InferenceServerClient(running.triton_grpc) as triton:
        asked = [
            triton.async_infer(wire.CAPTIONER.name, inputs, lambda result, error: None)
            for _ in range(8)
        ]
        for each in asked:
            each.cancel()
    wait_until(lambda: metric(running, "captionserve_slots_used") == 0)


def test_identical_requests_in_flight_are_computed_once(
    service: Callable[[str], ReadyReport],
) -> None:
    running = service("projected")
    image = picture(4713)
    before = encoded_once_idle(running)
    with (
        CaptionClient(running.grpc, timeout=WAIT_SECONDS) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        results = list(pool.map(lambda _: client.caption(image, LONG), range(12)))
    assert metric(running, "nv_inference_count", model="vision_encoder") - before == 1
    assert len({result.captions for result in results}) == 1
    assert sorted(result.cached for result in results) == [False] + [True] * 11


def test_the_cache_can_be_turned_off(model_repository: Callable[[str], Path]) -> None:
    image = picture(1)
    with (
        launched_service(model_repository("projected"), "--cache-megabytes", "0") as running,
        CaptionClient(running.grpc, timeout=WAIT_SECONDS) as client,
    ):
        results = [client.caption(image, LONG) for _ in range(3)]
        # The one that proved the service ready is counted too.
        assert metric(running, "nv_inference_count", model="vision_encoder") >= 4
    assert not any(result.cached for result in results)
    assert len({result.captions[0].token_ids for result in results}) == 1


def test_the_deadline_gives_the_best_so_far_to_who_allows_it(
    service: Callable[[str], ReadyReport],
) -> None:
    running = service("projected")
    options = GenerationOptions(num_beams=16, max_length=40, min_length=40, allow_partial=True)
    with CaptionClient(running.grpc, timeout=WAIT_SECONDS) as client:
        partial = first_partial(client, picture(2), options)
    caption = partial.captions[0]
    assert 0 < len(caption.token_ids) < 39
    assert not partial.cached
    assert math.isclose(
        caption.score, sum(caption.token_logprobs) / len(caption.token_ids), rel_tol=1e-4
    )
    wait_until(lambda: metric(running, "captionserve_slots_used") == 0)


def first_partial(
    client: CaptionClient, image: Image.Image, options: GenerationOptions
) -> CaptionResult:
    """A result that the deadline cut off; the time that suits depends on the machine."""
    timeout = 0.05
    while 0.01 < timeout < WAIT_SECONDS:
        try:
            result = client.caption(image, options, timeout=timeout)
        except CaptionError as error:
            if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
            timeout *= 1.3
            continue
        if result.captions[0].finish_reason is FinishReason.DEADLINE:
            return result
        timeout *= 0.8
    raise AssertionError("no time was enough to begin and too little to end")


def test_expired_and_cancelled_requests_free_their_slots(
    service: Callable[[str], ReadyReport],
) -> None:
    running = service("projected")

    def expire(number: int) -> str:
        try:
            client.caption(picture(number), LONG, timeout=0.15)
        except CaptionError as error:
            return error.code.name
        return "OK"

    with (
        CaptionClient(running.grpc, timeout=WAIT_SECONDS) as client,
        ThreadPoolExecutor(24) as pool,
    ):
        outcomes = set(pool.map(expire, range(48)))
        assert outcomes <= {"OK", "DEADLINE_EXCEEDED"}
        assert "DEADLINE_EXCEEDED" in outcomes
        wait_until(lambda: metric(running, "captionserve_slots_used") == 0)
        assert client.caption(picture(1), LONG, bypass_cache=True).text


@pytest.mark.parametrize("name", ["projected", "deit", DEMO])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_attention_is_the_decoders_own(
    name: str,
    num_beams: int,
    service: Callable[[str], ReadyReport],
    checkpoint_folder: Callable[[str], Path],
) -> None:
    (image,) = pictures(name, 1)
    options = GenerationOptions(num_beams=num_beams, output_attentions=True, max_length=14)
    with CaptionClient(service(name).grpc, timeout=WAIT_SECONDS) as client:
        (caption,) = client.caption(image, options).captions
    assert caption.attention is not None
    expected = decoder_attention(checkpoint_folder(name), image, caption.token_ids)
    found = np.array(caption.attention.values).reshape(len(caption.token_ids), -1)
    np.testing.assert_allclose(found, expected[:, -found.shape[1] :], atol=1e-5)
    assert caption.attention.rows * caption.attention.cols == found.shape[1]


def decoder_attention(
    folder: Path, image: Image.Image, token_ids: tuple[int, ...]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Transformers' cross-attention for each token, mean over layers and heads; [tokens, S]."""
    truth = reference(folder)
    model = truth.model
    model.decoder.set_attn_implementation("eager")
    pixels = truth.processor(image, return_tensors="pt")["pixel_values"]
    start = model.generation_config.decoder_start_token_id
    with torch.no_grad():
        output = model(
            pixel_values=pixels,
            decoder_input_ids=torch.tensor([[start, *token_ids[:-1]]]),
            output_attentions=True,
        )
    layers = torch.stack(output.cross_attentions)
    result: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = layers.mean(dim=(0, 2))[0].numpy()
    return result


def test_the_time_spent_on_images_is_counted(demo: ReadyReport) -> None:
    before = metric(demo, "captionserve_image_seconds")
    with CaptionClient(demo.grpc, timeout=WAIT_SECONDS) as client:
        client.caption(picture(1), bypass_cache=True)
    wait_until(lambda: metric(demo, "captionserve_image_seconds") > before)


def test_contradictory_options_are_refused_before_any_model_runs(demo: ReadyReport) -> None:
    before = encoded_once_idle(demo)
    refused = {
        GenerationOptions(temperature=0.5): {"options.temperature", "options.do_sample"},
        GenerationOptions(num_beams=2, num_return_sequences=3): {
            "options.num_return_sequences",
            "options.num_beams",
        },
        GenerationOptions(prefix="word " * 60): {"options.prefix", "options.max_length"},
        GenerationOptions(suppress_tokens=(10**6,)): {"options.suppress_tokens"},
    }
    with CaptionClient(demo.grpc, timeout=WAIT_SECONDS) as client:
        for options, fields in refused.items():
            with pytest.raises(CaptionError) as caught:
                client.caption(picture(1), options)
            assert caught.value.reason == "INVALID_OPTIONS"
            assert set(caught.value.field_violations) == fields
    assert metric(demo, "nv_inference_count", model="vision_encoder") == before


def test_a_failure_is_not_remembered_as_an_answer(service: Callable[[str], ReadyReport]) -> None:
    running = service("projected")
    with CaptionClient(running.grpc, timeout=WAIT_SECONDS) as client:
        for _ in range(3):
            with pytest.raises(CaptionError) as caught:
                client.caption(b"bad, and asked for again")
            assert caught.value.reason == "UNSUPPORTED_IMAGE_FORMAT"


def tensor(
    spec: wire.TensorSpec, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
) -> InferInput:
    name = spec.data_type.removeprefix("TYPE_")
    made = InferInput(spec.name, list(values.shape), "BYTES" if name == "STRING" else name)
    made.set_data_from_numpy(values)
    return made
