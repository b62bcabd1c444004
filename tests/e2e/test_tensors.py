"""Preprocessed tensors through the whole stack have the tokens of generate(), or a reason."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captionserve import (
    AsyncCaptionClient,
    CaptionClient,
    CaptionError,
    CaptionResult,
    GenerationOptions,
    Outcome,
)
from captionserve_server.serving.ready import ReadyReport

from tests.conftest import DEMO
from tests.pictures import pictures
from tests.reference import reference

IMAGES = 4
TIMEOUT_SECONDS = 120.0
WAYS: list[dict[str, Any]] = [
    {"num_beams": 1, "max_length": 20},
    {"num_beams": 4, "num_return_sequences": 2, "max_length": 20},
]
Service = Callable[[str], ReadyReport]


@pytest.fixture
def tensors(checkpoint_folder: Callable[[str], Path]) -> torch.Tensor:
    """What the processor makes of some pictures; float32 [images, 3, height, width]."""
    return reference(checkpoint_folder(DEMO)).pixel_values(pictures(DEMO, IMAGES))


async def awaited(
    target: str, tensors: torch.Tensor, options: GenerationOptions
) -> list[CaptionResult]:
    """The asynchronous client's answers, one by one and then of all at once."""
    async with AsyncCaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
        results = [await client.caption(each, options) for each in tensors]

        async def batches() -> Any:
            yield tensors[:3]
            yield tensors[3:].numpy()

        outcomes = [outcome async for outcome in client.caption_many(batches(), options)]
        return results + [answered(outcome) for outcome in outcomes]


def answered(outcome: Outcome) -> CaptionResult:
    assert outcome.result is not None, outcome.error
    return outcome.result


def token_ids(results: list[CaptionResult]) -> list[list[tuple[int, ...]]]:
    return [[caption.token_ids for caption in result.captions] for result in results]


@pytest.mark.parametrize("way", WAYS, ids=["greedy", "beams"])
def test_a_tensor_has_the_tokens_of_generate(
    way: dict[str, Any],
    tensors: torch.Tensor,
    service: Service,
    checkpoint_folder: Callable[[str], Path],
) -> None:
    truth = reference(checkpoint_folder(DEMO))
    expected = [truth.tokens_of(tensor[None], **way) for tensor in tensors]
    assert len({tokens[0] for tokens in expected}) > 1
    options = GenerationOptions(**way)
    target = service(DEMO).grpc
    with CaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
        alone = [client.caption(each, options, bypass_cache=True) for each in tensors]
        streamed = [update.result for update in client.caption_stream(tensors[0], options)][-1]
        for images in (tensors, tensors.numpy(), [tensors[:2].bfloat16(), *tensors[2:].half()]):
            many = client.caption_many(images, options, bypass_cache=True)
            assert token_ids([answered(outcome) for outcome in many]) == expected
    assert token_ids(alone) == expected
    assert streamed is not None
    assert token_ids([streamed]) == expected[:1]
    assert token_ids(asyncio.run(awaited(target, tensors, options))) == [*expected, *expected]


def test_what_no_processor_makes_is_refused_by_reason(
    tensors: torch.Tensor, service: Service
) -> None:
    broken = tensors[0].clone()
    broken[2, 1, 0] = float("inf")
    with CaptionClient(service(DEMO).grpc, timeout=TIMEOUT_SECONDS) as client:
        for wrong in (broken, tensors[0][:, :-1], tensors[0] * 1.3):
            with pytest.raises(CaptionError) as caught:
                client.caption(wrong)
            assert caught.value.reason == "INVALID_PIXEL_VALUES"
            assert set(caught.value.field_violations) == {"image"}
        with pytest.raises(ValueError, match="is several images"):
            client.caption(tensors)
        outcomes = list(client.caption_many([tensors[:1], broken, tensors[1]]))
    assert [outcome.index for outcome in outcomes] == [0, 1, 2]
    assert isinstance(outcomes[1].error, CaptionError)
    assert outcomes[0].result is not None
    assert outcomes[2].result is not None
