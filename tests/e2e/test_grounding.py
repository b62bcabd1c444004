"""Groundings, words and reasons for review through client, gateway and Triton."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from captionserve import (
    CaptionClient,
    CaptionError,
    CaptionResult,
    Framing,
    GenerationOptions,
    ReviewReason,
)
from captionserve_server.bulk.local_outcomes import local_outcomes
from captionserve_server.local import LocalCaptioner
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.triton import wire
from tritonclient.grpc import InferenceServerClient, InferInput

from tests.conftest import DEMO
from tests.pictures import pictures, png

WAIT_SECONDS = 60.0
IMAGES = 3
WAYS = {
    "greedy": GenerationOptions(num_beams=1, output_grounding=True),
    "beams": GenerationOptions(num_beams=4, num_return_sequences=3, output_grounding=True),
    "reranked": GenerationOptions(num_beams=4, num_return_sequences=2, rerank="grounding"),
    "penalised": GenerationOptions(
        num_beams=2, repetition_penalty=1.5, output_grounding=True, min_confidence=1.0
    ),
    "sampled": GenerationOptions(
        do_sample=True, seed=3, num_return_sequences=3, rerank="grounding", min_confidence=0.5
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_service_stream_many_and_edge_say_the_same(
    way: str, service: Callable[[str], ReadyReport], model_repository: Callable[[str], Path]
) -> None:
    options, images = WAYS[way], [png(image) for image in pictures(DEMO, IMAGES)]
    with CaptionClient(service(DEMO).grpc, timeout=WAIT_SECONDS) as client:
        served = [client.caption(image, options, bypass_cache=True) for image in images]
        streams = [list(client.caption_stream(image, options)) for image in images]
        many = [outcome.result for outcome in client.caption_many(images, options)]
    with LocalCaptioner(model_repository(DEMO)) as captioner:
        local = list(local_outcomes(captioner, images, options, Framing()))
    for one, stream, item, edge in zip(served, streams, many, local, strict=True):
        assert "".join(part.text for part in stream) == one.text
        tokens = itertools.chain.from_iterable(part.token_ids for part in stream)
        assert tuple(tokens) == one.captions[0].token_ids
        for other in (stream[-1].result, item, edge):
            assert isinstance(other, CaptionResult)
            assert_same(one, other)


def assert_same(one: CaptionResult, other: CaptionResult) -> None:
    for found, true in zip(one.captions, other.captions, strict=True):
        assert found.token_ids == true.token_ids
        assert found.token_groundings == pytest.approx(true.token_groundings, abs=1e-4)
        assert found.grounding == pytest.approx(true.grounding, abs=1e-4)
        assert found.confidence == pytest.approx(true.confidence, abs=1e-3)
        assert (found.needs_review, found.review_reasons) == (
            true.needs_review,
            true.review_reasons,
        )
        assert found.words
        for word, same in zip(found.words, true.words, strict=True):
            assert (word.text, word.first_token, word.tokens) == (
                same.text,
                same.first_token,
                same.tokens,
            )
            assert word.confidence == pytest.approx(same.confidence, abs=5e-3)
            assert word.grounding == pytest.approx(same.grounding, abs=1e-4)
            own = slice(word.first_token, word.first_token + word.tokens)
            assert word.text in "".join(found.token_texts[own])
            assert found.token_groundings is not None
            assert word.grounding == pytest.approx(math.fsum(found.token_groundings[own]))


def test_what_is_not_asked_for_is_not_there_and_changes_nothing(
    service: Callable[[str], ReadyReport],
) -> None:
    (image,) = pictures(DEMO, 1)
    with CaptionClient(service(DEMO).grpc, timeout=WAIT_SECONDS) as client:
        plain = client.caption(image, bypass_cache=True).captions[0]
        asked = client.caption(image, GenerationOptions(output_grounding=True)).captions[0]
    assert plain.token_groundings is None
    assert plain.grounding is None
    assert not plain.needs_review
    assert all(word.grounding is None for word in plain.words)
    assert (plain.token_ids, plain.token_logprobs) == (asked.token_ids, asked.token_logprobs)
    assert [word.text for word in plain.words] == plain.text.split()
    assert all(0 < word.confidence < 1 for word in plain.words)


def test_what_is_below_the_confidence_asked_for_needs_a_review(
    service: Callable[[str], ReadyReport],
) -> None:
    (image,) = pictures(DEMO, 1)
    with CaptionClient(service(DEMO).grpc, timeout=WAIT_SECONDS) as client:
        sure = client.caption(image, GenerationOptions(min_confidence=1e-9)).captions[0]
        unsure = client.caption(image, GenerationOptions(min_confidence=1.0)).captions[0]
        with pytest.raises(CaptionError) as refused:
            client.caption(image, GenerationOptions(min_confidence=1.5))
        with pytest.raises(CaptionError) as alone:
            client.caption(image, GenerationOptions(num_beams=1, rerank="grounding"))
    assert not sure.needs_review
    assert sure.review_reasons == ()
    assert unsure.needs_review
    assert unsure.review_reasons == (ReviewReason.LOW_CONFIDENCE,)
    assert set(refused.value.field_violations) == {"options.min_confidence"}
    assert set(alone.value.field_violations) == {"options.rerank", "options.num_beams"}


def test_kserve_callers_have_the_same_as_tensors(service: Callable[[str], ReadyReport]) -> None:
    (image,) = pictures(DEMO, 1)
    given: dict[str, Any] = {"num_beams": 2, "output_grounding": True, "min_confidence": 1.0}
    inputs = []
    for spec, value in ((wire.IMAGE, png(image)), (wire.OPTIONS, json.dumps(given).encode())):
        tensor = InferInput(spec.name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value], np.object_))
        inputs.append(tensor)
    with InferenceServerClient(service(DEMO).triton_grpc) as triton:
        answer = triton.infer(wire.CAPTIONER.name, inputs)
    with CaptionClient(service(DEMO).grpc, timeout=WAIT_SECONDS) as client:
        caption = client.caption(png(image), GenerationOptions(**given)).captions[0]
    groundings = answer.as_numpy(wire.TOKEN_GROUNDINGS.name)[0].tolist()
    assert groundings == pytest.approx(caption.token_groundings, abs=1e-4)
    confidences = answer.as_numpy(wire.WORD_CONFIDENCES.name)[0].tolist()
    assert confidences == pytest.approx([word.confidence for word in caption.words], abs=1e-3)
    assert answer.as_numpy(wire.REVIEW_REASONS.name).tolist() == [b"low_confidence"]
