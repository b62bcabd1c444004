"""What requests of some sizes make a service take, above what it takes at rest.

    python -m captionserve_server.bench.request_memory MODEL_REPOSITORY --json FILE

Each case has a service of its own, whose callers all send their requests at the same time. Memory
is the sum of the proportional set sizes of all the service's processes, /dev/shm with them.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from captionserve import CaptionClient, CaptionError
from PIL import Image

from captionserve_server.bench.machine import machine_facts
from captionserve_server.bench.processes import family_pss_mib
from captionserve_server.serving.launch import launched_service

_COMMAND = "python -m captionserve_server.bench.request_memory MODEL_REPOSITORY"
_SAMPLE_SECONDS = 0.05
_REQUESTS_EACH = 3
_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """Callers that ask at the same time.

    Attributes:
        callers: how many.
        side: rows and columns of their pictures.
        megabytes: of a request, of 1,000,000 bytes; the picture's file is filled up to it.
        request_megabytes: the service's `--max-request-megabytes`.
    """

    callers: int
    side: int
    megabytes: float
    request_megabytes: int


CASES = (
    Case(64, 512, 0.1, 96),
    Case(64, 1024, 1, 96),
    Case(16, 3464, 4, 96),
    Case(34, 3464, 4, 96),
    Case(8, 3464, 15, 128),
    Case(34, 3464, 15, 96),
    Case(34, 3464, 15, 128),
)


def picture(case: Case, number: int) -> bytes:
    """A JPEG file of the case's size; every number's is another one."""
    rng = np.random.default_rng(number)
    # Coarse enough that the picture itself stays far below the size.
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((case.side, case.side)).save(buffer, "JPEG", quality=85)
    # Decoders read to the end of the image and no further.
    return buffer.getvalue().ljust(round(case.megabytes * 1e6), b"\0")


class Peak:
    """The most memory that a service has taken, in MiB, while somebody looked."""

    def __init__(self, pid: int) -> None:
        """Begin with what it takes now."""
        self._pid = pid
        self.mib = family_pss_mib(pid)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look while the block runs."""
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(_SAMPLE_SECONDS):
                self.mib = max(self.mib, family_pss_mib(self._pid))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def measured(repository: Path, case: Case) -> dict[str, Any]:
    """A case with what it took, in MiB, and how many of its requests were captioned."""
    images = [picture(case, number) for number in range(case.callers)]
    arguments = ("--max-request-megabytes", str(case.request_megabytes))
    with (
        launched_service(repository, *arguments) as service,
        CaptionClient(service.grpc, timeout=_TIMEOUT_SECONDS) as client,
    ):
        # Also what only the first caption takes.
        client.caption(picture(case, case.callers))
        peak = Peak(service.pids["gateway"])
        rest = peak.mib
        with peak.watched():
            captioned = _ask_all(client, images)
        after = family_pss_mib(service.pids["gateway"])
    return asdict(case) | {
        "captioned": captioned,
        "of": case.callers * _REQUESTS_EACH,
        "rest_mib": round(rest),
        "more_mib": round(peak.mib - rest),
        "kept_mib": round(after - rest),
    }


def _ask_all(client: CaptionClient, images: Sequence[bytes]) -> int:
    """Send each image some times, one after the other, and all images at once."""

    def ask(image: bytes) -> int:
        captioned = 0
        for _ in range(_REQUESTS_EACH):
            try:
                client.caption(image, bypass_cache=True)
            except CaptionError:  # Refused often enough for the client to give up.
                continue
            captioned += 1
        return captioned

    with ThreadPoolExecutor(len(images)) as pool:
        return sum(pool.map(ask, images))


def main() -> None:
    """Measure every case some times, print the medians and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_repository", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cases = []
    for case in CASES:
        rounds = [measured(given.model_repository, case) for _ in range(given.rounds)]
        row = rounds[0] | {
            name: round(statistics.median(each[name] for each in rounds))
            for name in ("captioned", "rest_mib", "more_mib", "kept_mib")
        }
        cases.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
    if given.json:
        report = {
            "command": f"{_COMMAND} --rounds {given.rounds}",
            "machine": machine_facts(),
            "rounds": given.rounds,
            "cases": cases,
        }
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
