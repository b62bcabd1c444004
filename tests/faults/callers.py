"""Callers of both typed clients, who ask all the time and know the right answers."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc
from captionserve import (
    AsyncCaptionClient,
    CaptionClient,
    CaptionError,
    GenerationOptions,
    Outcome,
)

from tests.faults.served import wait_until

Kind = Literal["one", "words", "many"]
"""What is called: a caption, a stream of its words, many over one call."""

OPTIONS: dict[Kind, GenerationOptions] = {
    "one": GenerationOptions(num_beams=4),
    # Greedy search gives word by word.
    "words": GenerationOptions(num_beams=1),
    "many": GenerationOptions(num_beams=2),
}
# Images of one caption_many, and how many of them it has sent at a time.
MANY, WINDOW = 6, 3

# Half a second between calls: what is to be seen is what becomes of each, and to start another
# replica beside them takes the machine as well.
PAUSE_SECONDS = 0.5
# Whatever happens meanwhile a call is answered in this time, which is half of what gRPC would let
# pass before it looks a name up again.
TIMEOUT_SECONDS = 15.0
# What a stream ends with whose replica is killed; the latter is what Envoy makes of it.
_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL}


@dataclass(frozen=True)
class Way:
    """How callers reach a service.

    Attributes:
        name: of the way.
        target: as gRPC names it.
        token: of all callers that go this way.
    """

    name: str
    target: str
    token: str


@dataclass
class Callers:
    """One caller of each client, way and kind, with connections of its own.

    Attributes:
        images: what is asked about.
        right: the answers, by kind.
        credentials: for all clients.
        answered: right answers, by caller; each image of many is one.
        slowest: seconds of the longest call, by caller.
        failed: calls that failed or were answered wrongly, in words.
        killing: whether somebody is being killed.
        torn: streams that were lost meanwhile behind a word that they had given, likewise: no
            client makes them again.
    """

    images: Sequence[bytes] = field(repr=False)
    right: dict[Kind, list[str]]
    credentials: grpc.ChannelCredentials
    answered: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    killing: bool = False
    torn: list[str] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    # How many calls of each caller have ended.
    _calls: Counter[str] = field(default_factory=Counter)

    @property
    def streaming(self) -> int:
        """How many of them ask for streams of words."""
        return sum(name.endswith("words") for name in self._calls)

    @contextmanager
    def calling(self, ways: Sequence[Way]) -> Iterator[None]:
        """Call while the block runs."""
        threads = [
            threading.Thread(target=self._block, args=each)
            for each in itertools.product(ways, OPTIONS)
        ]
        threads.append(threading.Thread(target=lambda: asyncio.run(self._await(ways))))
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(self._calls) == 2 * len(ways) * len(OPTIONS))
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def go_on(self, calls: int) -> None:
        """Wait until each caller has ended so many more."""
        enough = {name: ended + calls for name, ended in self._calls.items()}
        wait_until(lambda: all(self._calls[name] >= then for name, then in enough.items()))

    def _block(self, way: Way, kind: Kind) -> None:
        """Call with the blocking client."""
        options = OPTIONS[kind]
        with CaptionClient(way.target, **self._arguments(way)) as client:
            for numbers in self._turns(kind):
                images = [self.images[number] for number in numbers]
                with self._judged("blocking", way, kind, numbers) as said:
                    if kind == "one":
                        said.append(client.caption(images[0], options, bypass_cache=True).text)
                    elif kind == "words":
                        for update in client.caption_stream(images[0], options):
                            said.append(update.text)
                    else:
                        for outcome in client.caption_many(
                            images, options, window=WINDOW, bypass_cache=True
                        ):
                            said.append(text_of(outcome))
                self._ended.wait(PAUSE_SECONDS)

    async def _await(self, ways: Sequence[Way]) -> None:
        """Call with the asyncio client."""
        callers = itertools.product(ways, OPTIONS)
        await asyncio.gather(*(self._await_one(*each) for each in callers))

    async def _await_one(self, way: Way, kind: Kind) -> None:
        options = OPTIONS[kind]
        async with AsyncCaptionClient(way.target, **self._arguments(way)) as client:
            for numbers in self._turns(kind):
                images = [self.images[number] for number in numbers]
                with self._judged("asyncio", way, kind, numbers) as said:
                    if kind == "one":
                        result = await client.caption(images[0], options, bypass_cache=True)
                        said.append(result.text)
                    elif kind == "words":
                        async for update in client.caption_stream(images[0], options):
                            said.append(update.text)
                    else:
                        async for outcome in client.caption_many(
                            images, options, window=WINDOW, bypass_cache=True
                        ):
                            said.append(text_of(outcome))
                await asyncio.sleep(PAUSE_SECONDS)

    def _arguments(self, way: Way) -> dict[str, Any]:
        return {
            "timeout": TIMEOUT_SECONDS,
            "credentials": self.credentials,
            "token": way.token,
        }

    def _turns(self, kind: Kind) -> Iterator[list[int]]:
        """Which images to ask about in each call, until it is enough."""
        numbers = itertools.cycle(range(len(self.images)))
        while not self._ended.is_set():
            yield list(itertools.islice(numbers, MANY if kind == "many" else 1))

    @contextmanager
    def _judged(
        self, client: str, way: Way, kind: Kind, numbers: Sequence[int]
    ) -> Iterator[list[str]]:
        """A call; the block puts what it is told into the list."""
        said: list[str] = []
        name, begin = f"{client}, {way.name}, {kind}", time.monotonic()
        try:
            yield said
            told = ["".join(said)] if kind == "words" else said
            expected = [self.right[kind][number] for number in numbers]
            if told == expected:
                self.answered[name] += len(told)
            else:
                self.failed.append(f"{name}: {told} instead of {expected}")
        except Exception as error:  # Whatever it is, the caller goes on.
            lost = self.killing and isinstance(error, CaptionError) and error.code in _LOST
            found = self.torn if lost and kind == "words" and said else self.failed
            found.append(f"{name}: {error!r} after {time.monotonic() - begin:.1f} s")
        took = round(time.monotonic() - begin, 1)
        self.slowest[name] = max(took, self.slowest.get(name, 0.0))
        self._calls[name] += 1


def text_of(outcome: Outcome) -> str:
    """What an image of many was called."""
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    return outcome.result.text
