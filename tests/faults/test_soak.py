"""After many mixed requests, a third of which are given up, everything is back where it was.

The suite runs some hundred; `make soak` runs 2,000 (--soak-requests).
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from captionserve import CaptionClient, CaptionError, GenerationOptions
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from captionserve_server.serving.ready import ReadyReport
from numpy.typing import NDArray

from tests.conftest import DEMO
from tests.faults.footprint import Footprint, footprint, idle, leaks, settled

log = logging.getLogger(__name__)
Pixels = NDArray[np.uint8]

IN_FLIGHT = 24
# The pools' threads, the allocators' arenas and the cache have filled up by then.
WARM_UP_REQUESTS = 100
WARM_UPS = 3

OPTIONS = (
    GenerationOptions(),
    GenerationOptions(num_beams=4, num_return_sequences=2),
    GenerationOptions(num_beams=3, repetition_penalty=1.3, no_repeat_ngram_size=2),
    GenerationOptions(num_beams=4, num_beam_groups=2, diversity_penalty=0.7),
    GenerationOptions(num_beams=4, force_words=["red"]),
    GenerationOptions(do_sample=True, num_return_sequences=3, top_k=0),
    GenerationOptions(do_sample=True, seed=4, top_p=0.9),
    GenerationOptions(prefix="a", bad_words=["red", "dog"], output_attentions=True),
)


class Load:
    """Requests of every kind; what became of them is counted."""

    def __init__(self, service: ReadyReport) -> None:
        self._client = CaptionClient(service.grpc, timeout=60.0)
        self._channel = grpc.insecure_channel(service.grpc)
        self._stub = caption_pb2_grpc.CaptionServiceStub(self._channel)
        self.outcomes: Counter[str] = Counter()

    def run(self, requests: int, seed: int) -> None:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            self.outcomes.update(pool.map(lambda number: self._one(seed + number), range(requests)))

    def close(self) -> None:
        self._client.close()
        self._channel.close()

    def _one(self, seed: int) -> str:
        chance = random.Random(seed)
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        options = chance.choice(OPTIONS)
        ways = (self._whole, self._whole, self._whole, self._stream, self._expire, self._cancel)
        try:
            return chance.choice(ways)(pixels, options, chance)
        except CaptionError as error:
            return error.code.name

    def _whole(self, pixels: Pixels, options: GenerationOptions, chance: random.Random) -> str:
        self._client.caption(pixels, options)
        return "OK"

    def _stream(self, pixels: Pixels, options: GenerationOptions, chance: random.Random) -> str:
        most = chance.choice((1, 2, 1000))
        for number, update in enumerate(self._client.caption_stream(pixels, options), start=1):
            if update.result is not None:
                return "OK"
            if number == most:
                return "LEFT"
        raise AssertionError("a stream ended without its result")

    def _expire(self, pixels: Pixels, options: GenerationOptions, chance: random.Random) -> str:
        self._client.caption(pixels, options, timeout=chance.uniform(0.005, 0.3))
        return "OK"

    def _cancel(self, pixels: Pixels, options: GenerationOptions, chance: random.Random) -> str:
        encoded = b"P6 64 64 255\n" + pixels.tobytes()
        request = caption_pb2.CaptionRequest(image=caption_pb2.Image(encoded=encoded))
        call = self._stub.Caption.future(request, timeout=60.0)
        try:
            call.exception(timeout=chance.uniform(0.0, 0.3))
        except grpc.FutureTimeoutError:
            call.cancel()
            return "CANCELLED"
        return "OK"


def warmed_up(service: ReadyReport, load: Load) -> Footprint:
    """The footprint after the warm-ups, with the most threads after any of them.

    gRPC starts threads for the calls that happen to coincide, and lets some of them go again.
    """
    seen: list[Footprint] = []
    for number in range(WARM_UPS):
        load.run(WARM_UP_REQUESTS, seed=number * WARM_UP_REQUESTS)
        seen.append(idle(service))
    return dataclasses.replace(seen[-1], threads=max(each.threads for each in seen))


def test_everything_is_back_where_it_was(
    service: Callable[[str], ReadyReport], pytestconfig: pytest.Config
) -> None:
    running = service(DEMO)
    load = Load(running)
    try:
        before = warmed_up(running, load)
        assert before.slots == 0
        load.outcomes.clear()
        load.run(pytestconfig.getoption("soak_requests"), seed=10_000)
        after = settled(running, before)
    finally:
        load.close()
    log.info("%s; before %s; after %s", dict(load.outcomes), before, after)
    assert after.slots == 0
    assert after.shared_files > 0
    assert leaks(before, after) == []
    given_up = sum(load.outcomes[name] for name in ("CANCELLED", "DEADLINE_EXCEEDED", "LEFT"))
    assert given_up >= 0.2 * sum(load.outcomes.values())
    assert set(load.outcomes) <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "LEFT"}


def test_a_held_slot_is_seen_as_a_leak(service: Callable[[str], ReadyReport]) -> None:
    # The control: the test above must be able to fail.
    running = service(DEMO)
    before = footprint(running)
    long = GenerationOptions(num_beams=8, max_length=32, min_length=32)
    picture = np.zeros((32, 32, 3), np.uint8)
    found: list[str] = []
    with CaptionClient(running.grpc) as client, ThreadPoolExecutor(1) as pool:
        while not any(leak.startswith("slots: ") for leak in found):
            call = pool.submit(client.caption, picture, long, bypass_cache=True)
            while not call.done():
                found += leaks(before, footprint(running))
