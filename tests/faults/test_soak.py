"""After many mixed requests, a third of which are given up, everything is back where it was.

The suite runs some hundred; `make soak` runs 2,000 (--soak-requests).
"""

from __future__ import annotations

import dataclasses
import logging
import random
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from captionserve import CaptionClient, CaptionError, GenerationOptions
from captionserve.v1 import caption_pb2, caption_pb2_grpc
from captionserve_server.serving.ready import ReadyReport
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import DEMO

log = logging.getLogger(__name__)
Pixels = NDArray[np.uint8]

IN_FLIGHT = 24
# The pools' threads, the allocators' arenas and the cache have filled up by then.
WARM_UP_REQUESTS = 100
WARM_UPS = 3
SETTLE_SECONDS = 60.0
# What allocators keep back; a leak of one image's states per ten requests is far more over 2,000.
MEMORY_SLACK_BYTES = 48 * 2**20
# gRPC starts and ends a few threads of its own as it sees fit.
SLACKS = {"slots": 0, "processes": 0, "threads": 6, "open_files": 6, "shared_files": 0}

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


@dataclass(frozen=True)
class Footprint:
    """What the service holds.

    Attributes:
        slots: decoder slots in use.
        processes: the gateway, Triton and its stubs.
        threads: of all of them.
        open_files: likewise.
        shared_files: files in /dev/shm of this service.
        memory_bytes: private memory of all processes.
    """

    slots: int
    processes: int
    threads: int
    open_files: int
    shared_files: int
    memory_bytes: int


def footprint(service: ReadyReport) -> Footprint:
    gateway = psutil.Process(service.pids["gateway"])
    processes = [gateway, *gateway.children(recursive=True)]
    return Footprint(
        slots=slots_used(service),
        processes=len(processes),
        threads=sum(process.num_threads() for process in processes),
        open_files=sum(process.num_fds() for process in processes),
        shared_files=len(shared_files(processes)),
        memory_bytes=sum(process.memory_full_info().uss for process in processes),
    )


def shared_files(processes: list[psutil.Process]) -> set[Path]:
    """What lies in /dev/shm under the names of these processes' Triton, in use or left behind."""
    mapped = " ".join(each.path for one in processes for each in one.memory_maps())
    prefixes = set(re.findall(r"/dev/shm/(captionserve-triton-.{8})", mapped))
    return {path for prefix in prefixes for path in Path("/dev/shm").glob(f"{prefix}*")}


def slots_used(service: ReadyReport) -> int:
    with urllib.request.urlopen(f"http://{service.triton_metrics}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return int(sum(s.value for s in samples if s.name == "captionserve_slots_used"))


def leaks(before: Footprint, after: Footprint) -> list[str]:
    """What has grown, in words."""
    found = [
        f"{name}: {getattr(before, name)} to {getattr(after, name)}"
        for name, slack in SLACKS.items()
        if getattr(after, name) > getattr(before, name) + slack
    ]
    if after.memory_bytes > before.memory_bytes + MEMORY_SLACK_BYTES:
        found.append(f"memory: {before.memory_bytes >> 20} to {after.memory_bytes >> 20} MiB")
    return found


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


def idle(service: ReadyReport) -> Footprint:
    """The footprint once no slot is in use, or after the time to settle.

    Who has given up is still decoded for a moment, and metrics are shown at a pace.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while (now := footprint(service)).slots and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def settled(service: ReadyReport, before: Footprint) -> Footprint:
    """The footprint once it is no larger than before, or after the time to settle."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while leaks(before, after := idle(service)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return after


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
