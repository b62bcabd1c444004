"""A running service: many at once, health, reflection, KServe."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from captionserve import (
    AsyncCaptionClient,
    CaptionClient,
    FinishReason,
    GenerationOptions,
)
from captionserve_server.evaluation.held_out import held_out_scenes
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.triton import wire
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.conftest import DEMO, DEMO_FOLDER

TIMEOUT_SECONDS = 120.0

Service = Callable[[str], ReadyReport]


def test_sixty_four_at_once_get_each_its_own_caption(service: Service) -> None:
    scenes = list(held_out_scenes("unseen_combinations", 64, seed=5))
    options = GenerationOptions(num_beams=4)
    with CaptionClient(service(DEMO).grpc, timeout=TIMEOUT_SECONDS) as client:
        one_by_one = [client.caption(scene.image, options) for scene in scenes]
        with ThreadPoolExecutor(64) as pool:
            together = list(pool.map(lambda scene: client.caption(scene.image, options), scenes))

    assert [r.captions[0].token_ids for r in together] == [
        r.captions[0].token_ids for r in one_by_one
    ]
    right = sum(r.text == s.caption for r, s in zip(together, scenes, strict=True))
    assert right >= 0.9 * len(scenes)
    assert len({result.text for result in together}) >= 60


def test_the_async_client_gets_the_same(service: Service) -> None:
    scenes = list(held_out_scenes("unseen_combinations", 8, seed=6))

    async def all_at_once() -> list[str]:
        async with AsyncCaptionClient(service(DEMO).grpc, timeout=TIMEOUT_SECONDS) as client:
            results = await asyncio.gather(*(client.caption(scene.image) for scene in scenes))
        return [result.text for result in results]

    with CaptionClient(service(DEMO).grpc, timeout=TIMEOUT_SECONDS) as client:
        expected = [client.caption(scene.image).text for scene in scenes]
    assert asyncio.run(all_at_once()) == expected


def test_a_caption_says_why_it_ended(service: Service) -> None:
    scene = next(held_out_scenes("unseen_combinations", 1, seed=10))
    with CaptionClient(service(DEMO).grpc) as client:
        whole = client.caption(scene.image)
        cut = client.caption(scene.image, GenerationOptions(max_length=4))
    assert whole.captions[0].finish_reason is FinishReason.EOS
    assert whole.model_version == 1
    assert cut.captions[0].finish_reason is FinishReason.LENGTH
    assert len(cut.captions[0].token_ids) == 3
    assert len(cut.captions[0].token_logprobs) == 3


def test_health_and_reflection_answer(service: Service) -> None:
    with grpc.insecure_channel(service(DEMO).grpc) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for name in ("", "captionserve.v1.CaptionService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert "captionserve.v1.CaptionService" in services


def test_kserve_clients_talk_to_triton_directly(service: Service) -> None:
    image = next(path for path in (DEMO_FOLDER / "images").iterdir() if path.suffix != ".json")
    with CaptionClient(service(DEMO).grpc) as client:
        expected = client.caption(image, GenerationOptions(num_beams=2))
    triton = tritonclient.grpc.InferenceServerClient(service(DEMO).triton_grpc)
    encoded = tritonclient.grpc.InferInput(wire.IMAGE.name, [1], "BYTES")
    encoded.set_data_from_numpy(np.array([image.read_bytes()], dtype=np.object_))
    options = tritonclient.grpc.InferInput(wire.OPTIONS.name, [1], "BYTES")
    options.set_data_from_numpy(np.array([b'{"num_beams": 2}'], dtype=np.object_))

    answer = triton.infer(wire.CAPTIONER.name, [encoded, options])

    assert answer.as_numpy(wire.TEXT.name)[0].decode() == expected.text
    assert answer.as_numpy(wire.SCORE.name)[0] == pytest.approx(expected.captions[0].score)
