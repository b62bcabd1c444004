"""Many images through caption_many of both clients while Triton is killed twice.

The suite asks for some hundred; `make soak-many` for 10,000 (--soak-many).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from captionserve import AsyncCaptionClient, CaptionClient, Outcome

from tests.conftest import DEMO
from tests.faults.served import WAIT_SECONDS, Served, serving, wait_until
from tests.pictures import numbered, pictures, png

_log = logging.getLogger(__name__)

PICTURES = 50
KILLS = 2
BROKEN_SHARE = 0.01
# An image must outlast a restart, and what its window holds besides.
TIMEOUT_SECONDS = 120.0
# What is wrong with a broken image, by how it is broken.
REASONS = {"cut off": "IMAGE_CORRUPT", "no image": "UNSUPPORTED_IMAGE_FORMAT", "missing": ""}


class Images:
    """So many images that nobody has asked for, a few of them broken; says how many were pulled."""

    def __init__(self, files: list[bytes], count: int, seed: int) -> None:
        chance = random.Random(seed)
        self._files = files
        self._first = seed * count
        self.count = count
        broken = chance.sample(range(count), max(len(REASONS), int(BROKEN_SHARE * count)))
        self.wrong = {
            number: list(REASONS)[place % len(REASONS)] for place, number in enumerate(broken)
        }
        self.pulled = 0

    def __iter__(self) -> Iterator[bytes | Path]:
        for number in range(self.count):
            self.pulled += 1
            yield self._image(number)

    def _image(self, number: int) -> bytes | Path:
        file = numbered(self._files[number % PICTURES], self._first + number)
        wrong = self.wrong.get(number)
        if wrong == "missing":
            return Path("/no/such/file.png")
        if wrong == "no image":
            return b"%d" % number
        return file[: len(file) // 2] if wrong == "cut off" else file

    def complaint(self, outcome: Outcome, right: list[str]) -> str | None:
        """What is wrong with an outcome, if anything is."""
        wrong = self.wrong.get(outcome.index)
        if outcome.result is not None and outcome.error is None and wrong is None:
            text, expected = outcome.result.text, right[outcome.index % PICTURES]
            return None if text == expected else f"{text!r} instead of {expected!r}"
        if outcome.result is None and wrong is not None:
            missing = wrong == "missing" and isinstance(outcome.error, FileNotFoundError)
            if missing or getattr(outcome.error, "reason", None) == REASONS[wrong]:
                return None
        return f"{outcome.index} ({wrong or 'good'}): {outcome.error!r}"


def blocking(target: str, images: Iterable[bytes | Path]) -> list[Outcome]:
    with CaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
        return list(client.caption_many(images))


def asynchronous(target: str, images: Iterable[bytes | Path]) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with AsyncCaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
            return [outcome async for outcome in client.caption_many(images, ordered=False)]

    return asyncio.run(run())


def kill_triton(served: Served) -> None:
    """Kill it, and wait for the next one to be ready."""
    pid = served.report["pids"]["triton"]
    served.triton.kill()
    wait_until(lambda: served.report["pids"]["triton"] != pid)


def test_each_image_has_its_outcome_once(
    model_repository: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    count = request.config.getoption("--soak-many")
    files = [png(image) for image in pictures(DEMO, PICTURES)]
    halves = [Images(files, count // 2, seed) for seed in range(2)]

    def pulled() -> int:
        return sum(images.pulled for images in halves)

    with serving(model_repository(DEMO), tmp_path) as served, ThreadPoolExecutor(2) as pool:
        target = served.report["grpc"]
        with CaptionClient(target, timeout=TIMEOUT_SECONDS) as client:
            right = [client.caption(file).text for file in files]
        begin = time.monotonic()
        many = [
            pool.submit(call, target, images)
            for call, images in zip((blocking, asynchronous), halves, strict=True)
        ]
        for kill in range(KILLS):
            share = (kill + 1) / (KILLS + 1)
            # An image takes a fraction of a second.
            wait_until(partial(lambda n: pulled() >= n, share * count), WAIT_SECONDS + count)
            kill_triton(served)
            assert pulled() < count, "too late to matter"
        outcomes = [call.result() for call in many]
        seconds = time.monotonic() - begin
    complaints = [
        complaint
        for images, half in zip(halves, outcomes, strict=True)
        for outcome in half
        if (complaint := images.complaint(outcome, right))
    ]
    cached = sum(o.result.cached for half in outcomes for o in half if o.result is not None)
    _log.info("%d outcomes in %.0f s, %d from memory", count, seconds, cached)
    for half in outcomes:
        assert sorted(outcome.index for outcome in half) == list(range(count // 2))
    assert complaints == []
