"""Load from many callers while processes are killed and stopped at random.

The long form is `make soak-faults`: ten minutes, with a death every 20 seconds.
"""

from __future__ import annotations

import logging
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
import pytest
from captionserve import CaptionClient, CaptionError, GenerationOptions
from captionserve_server.runtime.model_repository import MODELS

from tests.conftest import DEMO
from tests.faults.served import Served, serving, wait_until
from tests.pictures import pictures

_log = logging.getLogger(__name__)

CALLERS = 12
DEADLINE_SECONDS = 25.0
EVERY_SECONDS = 20.0
IMAGES = 12
LONG_SECONDS = 600.0
# How long after each kind of death the first caption must be there that was asked for after it.
BOUNDS = {"killed": 5.0, "stopped": 15.0, "Triton": 20.0}
WAYS = (
    GenerationOptions(num_beams=1),
    GenerationOptions(num_beams=4),
    GenerationOptions(num_beams=4, length_penalty=2.0, no_repeat_ngram_size=2),
    GenerationOptions(num_beams=2, max_length=12),
    GenerationOptions(do_sample=True, num_beams=1, seed=7),
)
ALLOWED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@dataclass
class Load:
    """What the callers have found."""

    served: Served
    ended: threading.Event = field(default_factory=threading.Event)
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    # When the newest right answer was asked for, by time.monotonic().
    newest: float = 0.0

    def caller(self, number: int, right: dict[tuple[int, int], str]) -> None:
        """Ask for one caption after the other, every third as a stream."""
        chance = random.Random(number)
        images = pictures(DEMO, IMAGES)
        with CaptionClient(self.served.report["grpc"], timeout=DEADLINE_SECONDS) as client:
            while not self.ended.is_set():
                key = chance.randrange(IMAGES), chance.randrange(len(WAYS))
                image, options = images[key[0]], WAYS[key[1]]
                begin = time.monotonic()
                try:
                    if chance.randrange(3):
                        text = client.caption(image, options, bypass_cache=True).text
                    else:
                        text = "".join(u.text for u in client.caption_stream(image, options))
                except CaptionError as error:
                    self.outcomes[error.code.name] += 1
                    if error.code not in ALLOWED or time.monotonic() - begin > DEADLINE_SECONDS + 1:
                        self.wrong.append(f"{error} after {time.monotonic() - begin:.1f} s")
                else:
                    self.outcomes["right"] += 1
                    self.newest = max(self.newest, begin)
                    if text != right[key]:
                        self.wrong.append(f"{text!r} instead of {right[key]!r}")


def harm(load: Load, chance: random.Random) -> tuple[str, float]:
    """Kill or stop a process, and wait for the first right answer asked for after that."""
    victim, number = (
        chance.choice(("Triton", *MODELS)),
        chance.choice((signal.SIGKILL, signal.SIGSTOP)),
    )
    kind = "Triton" if victim == "Triton" else "killed" if number == signal.SIGKILL else "stopped"
    process = load.served.victim(victim)
    begin = time.monotonic()
    process.send_signal(number)
    # A front's death is nobody's who asks the gateway: what counts is that all is there again.
    wait_until(lambda: has_ended(process))
    wait_until(lambda: load.newest > begin and all_there(load.served))
    return kind, time.monotonic() - begin


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # Between the two questions.
        return True


def all_there(served: Served) -> bool:
    try:
        return len(served.triton.children()) == len(MODELS) and served.triton.is_running()
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def test_every_call_ends_well_or_in_words(
    model_repository: Callable[[str], Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seconds = request.config.getoption("--soak-faults")
    chance = random.Random(seconds)
    shared = set(Path("/dev/shm").iterdir())
    with serving(model_repository(DEMO), tmp_path) as served:
        with CaptionClient(served.report["grpc"], timeout=60) as client:
            images = pictures(DEMO, IMAGES)
            right = {
                (number, way): client.caption(images[number], options).text
                for number in range(IMAGES)
                for way, options in enumerate(WAYS)
            }
        load = Load(served)
        threads = [
            threading.Thread(target=load.caller, args=(number, right)) for number in range(CALLERS)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        healed: dict[str, list[float]] = {}
        while time.monotonic() < end:
            kind, took = harm(load, chance)
            healed.setdefault(kind, []).append(took)
            load.ended.wait(max(0.0, min(EVERY_SECONDS - took, end - time.monotonic())))
        family = psutil.Process(served.process.pid).children(recursive=True)
        load.ended.set()
        said = served.end()
        for thread in threads:
            thread.join(2 * DEADLINE_SECONDS)
    _log.info("%s; healed within %s", dict(load.outcomes), healed)
    assert served.process.returncode == 0, said
    assert "Traceback" not in said
    assert load.wrong == []
    assert load.outcomes["right"] >= 0.99 * load.outcomes.total(), load.outcomes
    if seconds >= LONG_SECONDS:  # On a machine that does nothing else.
        for kind, times in healed.items():
            assert max(times) <= BOUNDS[kind], healed
    assert not any(process.is_running() for process in family)
    assert set(Path("/dev/shm").iterdir()) <= shared
