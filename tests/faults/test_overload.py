"""Far more calls than can be answered: the rest is refused, and nobody takes another's share.

The long form is `make soak-overload`: ten times as many calls as can be answered, in turns with as
many as can be.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import statistics
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from captionserve import CaptionClient
from captionserve_server.bench.images import bench_images
from captionserve_server.bench.processes import family_memory_mib
from captionserve_server.gateway.tokens import create_token
from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.ready import ReadyReport

from tests.conftest import DEMO
from tests.faults import load
from tests.faults.load import Asked, Outcomes
from tests.faults.served import wait_until
from tests.pictures import png
from tests.reference import picture
from tests.scraped import samples, total

_log = logging.getLogger(__name__)

CALLS_EACH = 60
NAMES = ("greedy", "modest")


@pytest.fixture(scope="module")
def bounded(
    model_repository: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ReadyReport, dict[str, str]]]:
    """A service that takes so many calls of one caller, and the tokens of its two callers."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    known = {name: create_token(tokens, name) for name in NAMES}
    bounds = ("--tokens", str(tokens), "--max-concurrent-per-client", str(CALLS_EACH))
    with launched_service(model_repository(DEMO), *bounds) as service:
        yield service, known


def asked_of(bounded: tuple[ReadyReport, dict[str, str]], name: str) -> Asked:
    service, tokens = bounded
    request = load.request_of(png(picture(1)), num_beams=4)
    return Asked(service.grpc, request, timeout=60.0, token=tokens[name])


def test_what_is_too_much_is_refused_in_words_and_the_rest_is_answered(
    bounded: tuple[ReadyReport, dict[str, str]],
) -> None:
    async def all_at_once() -> Outcomes:
        async with load.caller(asked_of(bounded, "greedy")) as caller:
            await asyncio.gather(*(caller.once() for _ in range(4 * CALLS_EACH)))
        return caller.outcomes

    outcomes = asyncio.run(all_at_once())
    assert set(outcomes.codes) == {"OK", "RESOURCE_EXHAUSTED"}, outcomes.codes
    assert outcomes.codes["OK"] >= CALLS_EACH
    assert outcomes.unsaid == []
    service, tokens = bounded
    with CaptionClient(service.grpc, token=tokens["modest"]) as client:
        wait_until(lambda: client.models().working == client.models().waiting == 0)


def test_one_greedy_caller_takes_no_more_than_its_share(
    bounded: tuple[ReadyReport, dict[str, str]],
) -> None:
    wanted = 100

    async def both() -> tuple[Outcomes, Outcomes, float]:
        async with (
            load.caller(asked_of(bounded, "greedy")) as greedy,
            load.caller(asked_of(bounded, "modest")) as modest,
        ):

            async def again_and_again(each: load.Caller) -> None:
                while True:
                    await asyncio.sleep(await each.once())

            crowd = [asyncio.create_task(again_and_again(greedy)) for _ in range(300)]
            while len(greedy.outcomes.answered) < CALLS_EACH:
                await greedy.once()
            begin = time.monotonic()
            few = [asyncio.create_task(again_and_again(modest)) for _ in range(30)]
            while len(modest.outcomes.answered) < wanted:
                await modest.once()
            for task in (*crowd, *few):
                task.cancel()
            await asyncio.gather(*crowd, *few, return_exceptions=True)
        return greedy.outcomes, modest.outcomes, begin

    greedy, modest, begin = asyncio.run(both())
    assert set(modest.codes) == {"OK"}, modest.codes
    greedy_meanwhile = sum(at > begin for at in greedy.answered)
    _log.info("greedy %d, modest %d", greedy_meanwhile, len(modest.answered))
    assert greedy_meanwhile <= 1.5 * len(modest.answered)
    assert greedy.unsaid == []


AT_ONCE = 16
TIMES_CAPACITY = 10
CONNECTIONS = 4
ROUNDS = 5
# Of a phase's time, until as much is in work as may be.
FILLING_SHARE = 0.4
MEMORY_SLACK_MIB = 64.0
SOAK_OPTIONS = {"num_beams": 4, "min_length": 16, "max_length": 16}
# As many tokens of as many beams as there may be: for a caption of the demo's that takes no longer
# than its refusal, only the refusing would be measured.
DEMO_SOAK_OPTIONS = {"num_beams": 16, "min_length": 32, "max_length": 32}


def test_at_ten_times_the_capacity_as_much_is_done_as_at_its_peak(
    model_repository: Callable[[str], Path], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    seconds: float = request.config.getoption("--soak-overload")
    if not seconds:
        pytest.skip("--soak-overload SECONDS measures for so long; make soak-overload does")
    # Callers in Python cost nearly what refusing them costs, on the cores that are measured.
    if shutil.which("h2load") is None:
        pytest.skip("h2load of nghttp2-client is not installed")
    given = request.config.getoption("--soak-repository")
    repository, options = (
        (given, SOAK_OPTIONS) if given else (model_repository(DEMO), DEMO_SOAK_OPTIONS)
    )
    with launched_service(repository) as service:
        crowd = Crowd(service, load.request_of(bench_images(1)[0], **options), tmp_path)
        # In turns: a machine that others share may do half as much a minute later.
        rounds = []
        for _ in range(ROUNDS):
            peak = crowd.ask(seconds, at_once=AT_ONCE)
            rounds.append((peak, crowd.ask(seconds, rate=TIMES_CAPACITY * peak.answered)))
    overloads = [overload for _, overload in rounds]
    ratio = statistics.median(overload.answered / peak.answered for peak, overload in rounds)
    # Nine of ten are refused.
    refusal = statistics.median(each for overload in overloads for each in overload.call_seconds)
    measured = {
        "peak images/s": [round(peak.answered, 2) for peak, _ in rounds],
        "goodput images/s": [round(overload.answered, 2) for overload in overloads],
        "refused calls/s": [round(overload.refused, 1) for overload in overloads],
        "median of goodput / peak": ratio,
        "median refusal s": refusal,
        "most MiB": [overload.memory_mib for overload in overloads],
    }
    _log.info("%s", measured)
    assert all(overload.refused > 5 * overload.answered for overload in overloads), measured
    assert ratio >= 0.9, measured
    assert refusal < 0.05, measured
    assert overloads[-1].memory_mib < overloads[0].memory_mib + MEMORY_SLACK_MIB, measured


@dataclass
class Phase:
    """What came of a load, from when it was full until nothing more was asked.

    Attributes:
        answered: captions a second.
        refused: calls a second.
        call_seconds: how long each call took.
        memory_mib: the most that the service took.
    """

    answered: float
    refused: float
    call_seconds: list[float]
    memory_mib: float


class Crowd:
    """Callers by h2load."""

    def __init__(self, service: ReadyReport, request: bytes, folder: Path) -> None:
        self._service = service
        self._log = folder / "calls"
        message = folder / "message"
        message.write_bytes(b"\0" + struct.pack(">I", len(request)) + request)
        headers = {
            "content-type": "application/grpc",
            "te": "trailers",
            "grpc-timeout": "30S",
            "captionserve-request-bytes": str(len(request)),
        }
        self._command = [
            *("h2load", f"http://{service.grpc}{load.METHOD}", "--data", str(message)),
            *(word for name, value in headers.items() for word in ("-H", f"{name}: {value}")),
            *("--clients", str(CONNECTIONS), "--log-file", str(self._log)),
        ]

    def ask(self, seconds: float, *, at_once: int = 0, rate: float = 0.0) -> Phase:
        """So many calls at once, or so many new ones a second whatever becomes of them."""
        paced = (
            ("--max-concurrent-streams", str(at_once // CONNECTIONS))
            if at_once
            else ("--max-concurrent-streams", "1000", "--rps", str(round(rate / CONNECTIONS)))
        )
        self._log.unlink(missing_ok=True)
        command = [*self._command, *paced, "--duration", str(int(seconds))]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as callers:
            time.sleep(FILLING_SHARE * seconds)
            begin, before = time.monotonic(), self._counted()
            memory = []
            while time.monotonic() < begin + (1 - FILLING_SHARE) * seconds - 1:
                memory.append(family_memory_mib(self._service.pids["gateway"]))
                time.sleep(1.0)
            took, after = time.monotonic() - begin, self._counted()
            assert callers.wait(60) == 0
        wait_until(lambda: not total(self._service.metrics, "captionserve_working"))
        return Phase(
            answered=(after["OK"] - before["OK"]) / took,
            refused=(after["RESOURCE_EXHAUSTED"] - before["RESOURCE_EXHAUSTED"]) / took,
            call_seconds=[
                int(line.split()[2]) / 1e6 for line in self._log.read_text().splitlines()
            ],
            memory_mib=max(memory),
        )

    def _counted(self) -> Counter[str]:
        """Calls that have ended, by their codes."""
        counted: Counter[str] = Counter()
        for sample in samples(self._service.metrics, "captionserve_requests_total"):
            counted[sample.labels["code"]] += int(sample.value)
        return counted
