"""Far more calls than can be answered: the rest is refused, and nobody takes another's share.

The long form is `make soak-overload`: ten times as many calls as can be answered, in turns with as
many as can be.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
ROUNDS = 5
# Of a phase's time, until as much is in work as may be.
FILLING_SHARE = 0.4
MEMORY_SLACK_MIB = 64.0
SOAK_OPTIONS = {"num_beams": 4, "min_length": 16, "max_length": 16}
# As many tokens of as many beams as there may be: for a caption of the demo's that takes no longer
# than its refusal, only the refusing would be measured.
DEMO_SOAK_OPTIONS = {"num_beams": 16, "min_length": 32, "max_length": 32}


def test_at_ten_times_the_capacity_as_much_is_done_as_at_its_peak(
    model_repository: Callable[[str], Path], request: pytest.FixtureRequest
) -> None:
    seconds: float = request.config.getoption("--soak-overload")
    if not seconds:
        pytest.skip("--soak-overload SECONDS measures for so long; make soak-overload does")
    given = request.config.getoption("--soak-repository")
    repository, options = (
        (given, SOAK_OPTIONS) if given else (model_repository(DEMO), DEMO_SOAK_OPTIONS)
    )
    with launched_service(repository) as service:
        asked = Asked(service.grpc, load.request_of(bench_images(1)[0], **options))
        # In turns: a machine that others share may do half as much a minute later.
        rounds = [_round(service, asked, seconds) for _ in range(ROUNDS)]
    ratios = [overload.rate / peak.rate for peak, overload in rounds]
    refused_after = [each for _, overload in rounds for each in overload.outcomes.refused_after]
    memory = [overload.memory_mib for _, overload in rounds]
    measured = {
        "peak images/s": [round(peak.rate, 2) for peak, _ in rounds],
        "goodput images/s": [round(overload.rate, 2) for _, overload in rounds],
        "median of goodput / peak": statistics.median(ratios),
        "codes": [dict(overload.outcomes.codes) for _, overload in rounds],
        "median refusal s": statistics.median(refused_after),
        "most MiB": memory,
    }
    _log.info("%s", measured)
    assert statistics.median(ratios) >= 0.9, measured
    assert statistics.median(refused_after) < 0.05, measured
    assert memory[-1] < memory[0] + MEMORY_SLACK_MIB, measured
    assert all(overload.outcomes.unsaid == [] for _, overload in rounds)


@dataclass
class Phase:
    """Some time under one load.

    Attributes:
        outcomes: of all its calls.
        rate: answers a second.
        memory_mib: the most that the service took.
    """

    outcomes: Outcomes
    rate: float
    memory_mib: float


def _round(service: ReadyReport, asked: Asked, seconds: float) -> tuple[Phase, Phase]:
    """As many calls as can be answered, then ten times as many."""
    peak = _phase(service, seconds, "closed", asked, AT_ONCE, seconds)
    overload = _phase(service, seconds, "open", asked, TIMES_CAPACITY * peak.rate, seconds)
    return peak, overload


def _phase(service: ReadyReport, seconds: float, kind: str, *arguments: Any) -> Phase:
    """A load, and what came of it from when it was full until nothing more was asked."""
    begin = time.monotonic()
    with load.apart(kind, *arguments) as running:
        memory = max(memory_meanwhile(service.pids["gateway"], running))
        outcomes = running.result()
    full = begin + FILLING_SHARE * seconds
    answered = [at for at in outcomes.answered if full <= at <= begin + seconds]
    return Phase(outcomes, len(answered) / ((1 - FILLING_SHARE) * seconds), memory)


def memory_meanwhile(pid: int, running: Future[Outcomes]) -> Iterator[float]:
    """The service's memory in MiB, now and then."""
    while not running.done():
        yield family_memory_mib(pid)
        time.sleep(1.0)
