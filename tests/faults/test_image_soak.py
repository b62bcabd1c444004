"""Damaged images by the hundreds: captioned or refused, alike in service and edge mode.

The suite takes some hundred; `make soak-images` takes 5,000 (--soak-images).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from captionserve import CaptionClient, CaptionError, GenerationOptions
from captionserve_server.core.decode_budget import BYTES_PER_MEGABYTE, DEFAULT_DECODE_MEGABYTES
from captionserve_server.core.errors import CaptionServeError
from captionserve_server.local import LocalCaptioner, LocalResult
from captionserve_server.serving.ready import ReadyReport
from PIL import Image

from tests.conftest import DEMO
from tests.damaged_images import damaged_files
from tests.pictures import png

log = logging.getLogger(__name__)

REFUSALS = {"IMAGE_CORRUPT", "UNSUPPORTED_IMAGE_FORMAT", "IMAGE_TOO_MANY_PIXELS"}
IN_FLIGHT = 16
# For each image, with those before it: none keeps the others waiting.
TIMEOUT_SECONDS = 30.0
SEED = 14
# What is made of pixels tells images apart; a longer caption tells no more.
SHORT = GenerationOptions(max_length=6)
# Allocators' arenas, and all that is no image: graphs at work, messages.
SLACK_BYTES = 160 << 20


def test_damaged_images_are_captioned_or_refused_alike(
    service: Callable[[str], ReadyReport],
    model_repository: Callable[[str], Path],
    pytestconfig: pytest.Config,
) -> None:
    files = list(damaged_files(pytestconfig.getoption("soak_images"), SEED))
    running = service(DEMO)
    with CaptionClient(running.grpc, timeout=TIMEOUT_SECONDS) as client:
        served_caption(client, files[0])
        memory = PeakMemory(running)
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            served = list(pool.map(lambda encoded: served_caption(client, encoded), files))
    with LocalCaptioner(model_repository(DEMO)) as captioner:
        local = [
            outcome.text if isinstance(outcome, LocalResult) else reason_of(outcome)
            for outcome in captioner.caption_each(files, SHORT)
        ]
    outcomes = Counter(each if each in REFUSALS else "captioned" for each in served)
    log.info("%s; %s", dict(outcomes), memory)
    assert served == local
    assert outcomes["captioned"] > 0
    assert not {each for each in served if each.isupper()} - REFUSALS
    assert memory.growth < DEFAULT_DECODE_MEGABYTES * BYTES_PER_MEGABYTE + SLACK_BYTES


def test_large_images_at_once_are_decoded_one_after_another(
    service: Callable[[str], ReadyReport],
) -> None:
    # 320 MB each, of the 512 MiB that all may take; few bytes to send.
    images = [png(Image.new("RGBA", (8000, 5000 + number))) for number in range(3)]
    running = service(DEMO)
    with CaptionClient(running.grpc, timeout=TIMEOUT_SECONDS) as client:
        memory = PeakMemory(running)
        with ThreadPoolExecutor(len(images)) as pool:
            served = list(pool.map(lambda encoded: served_caption(client, encoded), images))
    log.info("%s", memory)
    assert not REFUSALS & set(served)
    assert memory.growth < 320e6 + SLACK_BYTES


class PeakMemory:
    """By how much the memory of the decoder's process has grown at most."""

    def __init__(self, service: ReadyReport) -> None:
        """Begin to measure."""
        gateway = psutil.Process(service.pids["gateway"])
        stubs = [each for each in gateway.children(recursive=True) if is_decoder(each)]
        (self._status,) = (Path(f"/proc/{stub.pid}/status") for stub in stubs)
        # The kernel's way to begin the peak anew.
        self._status.with_name("clear_refs").write_text("5")
        self._before = self._peak()

    @property
    def growth(self) -> int:
        """In bytes."""
        return self._peak() - self._before

    def __str__(self) -> str:
        """Before and at most, in MiB."""
        return f"decoder from {self._before >> 20} to {self._peak() >> 20} MiB"

    def _peak(self) -> int:
        lines = dict(line.split(":") for line in self._status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) << 10


def is_decoder(process: psutil.Process) -> bool:
    return any("/decoder/" in argument for argument in process.cmdline())


def served_caption(client: CaptionClient, encoded: bytes) -> str:
    """A caption, or the reason why there is none."""
    try:
        return client.caption(encoded, SHORT).text
    except CaptionError as error:
        return error.reason


def reason_of(error: Exception) -> str:
    assert isinstance(error, CaptionServeError)
    return error.reason
