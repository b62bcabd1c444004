"""Callers of both typed clients, who ask all the time and know the right answers."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import grpc
from captionserve import (
    AsyncCaptionClient,
    CaptionClient,
    GenerationOptions,
    Outcome,
)

from tests.faults.served import wait_until

Client = Literal["blocking", "asyncio"]

Kind = Literal["one", "words", "many"]
"""What is called: a caption, a stream of its words, many over one call."""

OPTIONS: dict[Kind, GenerationOptions] = {
    "one": GenerationOptions(num_beams=4),
    # Greedy search gives word by word.
    "words": GenerationOptions(num_beams=1),
    "many": GenerationOptions(num_beams=2),
}
# Images of one caption_many, and how many of them it has sent at a time.
MANY, WINDOW = 4, 2

# Between the calls of each caller: what becomes of them is to be seen, and another replica is to
# start beside them on the same machine.
PAUSE_SECONDS = 0.4
# Whatever happens meanwhile a call is answered in this time, which is half of what gRPC would let
# pass before it looks a name up again.
TIMEOUT_SECONDS = 15.0


class Who(NamedTuple):
    """A caller: with which client it calls, which way, and what."""

    client: Client
    way: str
    kind: Kind

    @property
    def name(self) -> str:
        return "-".join(self)


def all_kinds(way: str) -> list[Who]:
    """Callers of both clients who go a way."""
    return [Who(client, way, kind) for client in get_args(Client) for kind in OPTIONS]


@dataclass
class Callers:
    """Who calls; each has a client, and connections, of its own.

    Attributes:
        tokens: of each of them.
        targets: whom they call, by way.
        credentials: of all of them.
        images: what they ask about.
        right: the answers, by kind.
        pause_seconds: between calls.
        answered: right answers, by caller; each image of many is one.
        slowest: seconds of the longest call, likewise.
        failed: calls that failed or were answered wrongly, in words.
    """

    tokens: Mapping[Who, str]
    targets: Mapping[str, str]
    credentials: grpc.ChannelCredentials
    images: Sequence[bytes] = field(repr=False)
    right: Mapping[Kind, list[str]]
    pause_seconds: float = PAUSE_SECONDS
    answered: Counter[Who] = field(default_factory=Counter)
    slowest: dict[Who, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)
    # How many calls of each caller have ended.
    _calls: Counter[Who] = field(default_factory=Counter)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Call while the block runs."""
        threads = [
            threading.Thread(target=self._block, args=(who,))
            for who in self.tokens
            if who.client == "blocking"
        ]
        threads.append(threading.Thread(target=lambda: asyncio.run(self._await_all())))
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: self._calls.keys() == self.tokens.keys())
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join()

    def go_on(self, calls: int) -> None:
        """Wait until each caller has ended so many more."""
        enough = {who: ended + calls for who, ended in self._calls.items()}
        wait_until(lambda: all(self._calls[who] >= then for who, then in enough.items()))

    def _block(self, who: Who) -> None:
        kind, options = who.kind, OPTIONS[who.kind]
        with CaptionClient(self.targets[who.way], **self._arguments(who)) as client:
            for numbers in self._turns(kind):
                images = [self.images[number] for number in numbers]
                with self._judged(who, numbers) as said:
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
                self._ended.wait(self.pause_seconds)

    async def _await_all(self) -> None:
        callers = [who for who in self.tokens if who.client == "asyncio"]
        await asyncio.gather(*map(self._await, callers))

    async def _await(self, who: Who) -> None:
        kind, options = who.kind, OPTIONS[who.kind]
        async with AsyncCaptionClient(self.targets[who.way], **self._arguments(who)) as client:
            for numbers in self._turns(kind):
                images = [self.images[number] for number in numbers]
                with self._judged(who, numbers) as said:
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
                await asyncio.sleep(self.pause_seconds)

    def _arguments(self, who: Who) -> dict[str, Any]:
        return {
            "timeout": TIMEOUT_SECONDS,
            "credentials": self.credentials,
            "token": self.tokens[who],
        }

    def _turns(self, kind: Kind) -> Iterator[list[int]]:
        """Which images to ask about in each call, until it is enough."""
        numbers = itertools.cycle(range(len(self.images)))
        while not self._ended.is_set():
            yield list(itertools.islice(numbers, MANY if kind == "many" else 1))

    @contextmanager
    def _judged(self, who: Who, numbers: Sequence[int]) -> Iterator[list[str]]:
        """A call; the block puts what it is told into the list."""
        said: list[str] = []
        streaming, begin = who.kind == "words", time.monotonic()
        try:
            yield said
            told = ["".join(said)] if streaming else said
            expected = [self.right[who.kind][number] for number in numbers]
            if told == expected:
                self.answered[who] += len(told)
            else:
                self.failed.append(f"{who.name}: {told} instead of {expected}")
        except Exception as error:  # Whatever it is, the caller goes on.
            self.failed.append(f"{who.name}: {error!r} after {time.monotonic() - begin:.1f} s")
        took = round(time.monotonic() - begin, 1)
        self.slowest[who] = max(took, self.slowest.get(who, 0.0))
        self._calls[who] += 1


def text_of(outcome: Outcome) -> str:
    """What an image of many was called."""
    if outcome.error is not None:
        raise outcome.error
    assert outcome.result is not None
    return outcome.result.text
