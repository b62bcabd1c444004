"""Who may come in, and whose turn it is: what one caller asks must not cost another.

    Room    bounds calls and bytes in flight, of each caller and in all; decided before a request is
            read, so that nobody fills the memory
    Turns   the queue before the decoder, which holds what fits its slots: fair among callers, bulk
            behind interactive, and closed to those who could not be answered in time; an image
            whose parts are captioned, too, counts as so many views, for each takes one of the slots

A caller is known by its identity, which a token or a certificate says.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from captionserve_server.core.errors import DeadlineExceededError, OverloadedError

# How much the newest answer counts in what the next is reckoned to take.
_NEWEST_SHARE = 0.1
# How many deviations longer than usual an answer is reckoned to take. Who has less time does not
# get it, for what is computed and comes too late is taken from all others: at the door more is
# asked for than at the turn, so that who is let in to wait does so for something.
_DOOR_DEVIATIONS, _TURN_DEVIATIONS = 2, 1


@dataclass
class _Use:
    calls: int = 0
    bytes: int = 0


class Room:
    """Calls and bytes in flight."""

    def __init__(self, *, calls: int, calls_each: int, megabytes: int, megabytes_each: int) -> None:
        """Begin empty.

        Args:
            calls: at once, of all callers.
            calls_each: at once, of one caller.
            megabytes: of all requests that are read or waiting.
            megabytes_each: likewise, of one caller.
        """
        self._most = _Use(calls, megabytes * 2**20)
        self._most_each = _Use(calls_each, megabytes_each * 2**20)
        self.all = _Use()
        self._each: dict[str, _Use] = {}

    @contextmanager
    def taken(self, identity: str, request_bytes: int) -> Iterator[Callable[[int], None]]:
        """Have room for a call while the block runs.

        Args:
            identity: whose call it is.
            request_bytes: what it will take, at most.

        Yields:
            what is to be told how many bytes it takes, once that is known.

        Raises:
            OverloadedError: if there is none, for this caller or for anybody.
        """
        own = self._each.setdefault(identity, _Use())
        for use, most, whose in (
            (self.all, self._most, "requests"),
            (own, self._most_each, "requests of this caller"),
        ):
            if use.calls + 1 > most.calls:
                raise OverloadedError(f"too many {whose} are in progress")
            if use.bytes + request_bytes > most.bytes:
                raise OverloadedError(f"too many bytes of {whose} are in progress")
        for use in (self.all, own):
            use.calls += 1
            use.bytes += request_bytes
        held = request_bytes

        def takes(known_bytes: int) -> None:
            nonlocal held
            for use in (self.all, own):
                use.bytes += known_bytes - held
            held = known_bytes

        try:
            yield takes
        finally:
            for use in (self.all, own):
                use.calls -= 1
                use.bytes -= held
            if not own.calls:
                self._each.pop(identity, None)


@dataclass(eq=False)
class _Waiting:
    """One who waits for a turn.

    Attributes:
        turn: done when it has come.
        views: what it takes of the decoder.
    """

    turn: asyncio.Future[None]
    views: int


@dataclass
class _Caller:
    """One identity's share of the decoder."""

    # Views, as is all that is counted here.
    working: int = 0
    # The number of its last turn; 0 before the first.
    last_turn: int = 0
    # By priority, the more urgent first.
    waiting: tuple[collections.deque[_Waiting], ...] = field(
        default_factory=lambda: (collections.deque(), collections.deque())
    )

    def waiting_views(self, *, bulk: bool) -> int:
        """What waits for turns before another that is bulk, or is not."""
        return sum(each.views for queue in self.waiting[: 1 + bulk] for each in queue)

    @property
    def idle(self) -> bool:
        return not (self.working or any(self.waiting))


class Turns:
    """Lets as many views be worked on at once as the decoder takes.

    Attributes:
        at_once: how many that is; may be changed.
        working: views that are worked on.
        waiting: views that wait for their turn.
    """

    def __init__(self, at_once: int) -> None:
        """Begin with nobody at work."""
        self.at_once = at_once
        self.working = 0
        self.waiting = 0
        self._callers: dict[str, _Caller] = {}
        self._turns = 0
        # What an answer takes, and how far from that it is usually, in seconds; 0 if unknown.
        self._answer_seconds = 0.0
        self._deviation_seconds = 0.0

    def check(self, identity: str, *, views: int, bulk: bool, deadline: float) -> None:
        """Refuse at once, and cheaply, who would be refused a turn.

        Args:
            identity: who wants it.
            views: how many of its image's are to be worked on.
            bulk: whether it may wait behind all that is interactive.
            deadline: when the answer must be there, by the event loop's clock.

        Raises:
            OverloadedError: if those before it will have taken the time.
        """
        if self._is_free(views):
            return
        needed = self._needed_seconds(self._ahead(identity, bulk, views) + views, _DOOR_DEVIATIONS)
        _refuse_late(deadline - asyncio.get_running_loop().time(), needed)

    @asynccontextmanager
    async def turn(
        self, identity: str, *, views: int, bulk: bool, deadline: float
    ) -> AsyncIterator[None]:
        """Wait for a turn, and have it while the block runs.

        Args:
            identity: who wants it.
            views: how many of its image's are to be worked on.
            bulk: whether it may wait behind all that is interactive.
            deadline: when the answer must be there, by the event loop's clock.

        Raises:
            OverloadedError: if those before it will have taken the time; nearly always at once.
            DeadlineExceededError: if the deadline passed meanwhile.
        """
        clock = asyncio.get_running_loop().time
        if self._is_free(views):
            # Nothing is reckoned: what is known may be of a time when there was more to do.
            needed = 0.0
            self._begin(identity, views)
        else:
            self.check(identity, views=views, bulk=bulk, deadline=deadline)
            await self._wait(identity, views, bulk, deadline)
            needed = self._needed_seconds(0, _TURN_DEVIATIONS)
        begin = clock()
        try:
            _refuse_late(deadline - begin, needed)
            yield
            self._took(clock() - begin)
        except (asyncio.CancelledError, DeadlineExceededError):
            # It would have taken longer still; were it not counted, nobody late would ever be.
            if clock() - begin > self._answer_seconds:
                self._took(clock() - begin)
            raise
        finally:
            self._end(identity, views)

    def _is_free(self, views: int) -> bool:
        """Whether a newcomer has its turn at once."""
        return self._fits(views) and not self.waiting

    def _fits(self, views: int) -> bool:
        """Whether there is room now; for more than there ever is, when nobody else works."""
        return self.working + min(views, self.at_once) <= self.at_once

    def _ahead(self, identity: str, bulk: bool, views: int) -> int:
        """How many views have their turns before a newcomer's, at most."""
        own = self._callers.get(identity)
        own_waiting = 0 if own is None else own.waiting_views(bulk=bulk)
        # Fair turns: before one's own next, each other caller has as many as oneself, at most.
        return own_waiting + sum(
            min(own_waiting + views, other.waiting_views(bulk=bulk))
            for other in self._callers.values()
            if other is not own
        )

    def _needed_seconds(self, views: int, deviations: int) -> float:
        """What it takes to be answered after so many views, as far as the last answers tell."""
        # From a full decoder, answers come one after the other in this time.
        wait = views * self._answer_seconds / self.at_once
        return wait + self._answer_seconds + deviations * self._deviation_seconds

    async def _wait(self, identity: str, views: int, bulk: bool, deadline: float) -> None:
        caller = self._callers.setdefault(identity, _Caller())
        loop = asyncio.get_running_loop()
        own = _Waiting(loop.create_future(), views)
        queue = caller.waiting[bulk]
        queue.append(own)
        self.waiting += views
        try:
            await asyncio.wait_for(asyncio.shield(own.turn), deadline - loop.time())
        except BaseException as error:
            if own.turn.done():  # It came together with the end.
                self._end(identity, views)
            else:
                queue.remove(own)
                self.waiting -= views
                self._forget_if_idle(identity)
                # Those behind it may find room where it did not.
                self._next()
            if isinstance(error, asyncio.TimeoutError):
                raise DeadlineExceededError(
                    "the deadline passed before the caption was begun"
                ) from error
            raise

    def _begin(self, identity: str, views: int) -> None:
        self._turns += 1
        caller = self._callers.setdefault(identity, _Caller())
        caller.last_turn = self._turns
        caller.working += views
        self.working += views

    def _end(self, identity: str, views: int) -> None:
        self._callers[identity].working -= views
        self.working -= views
        self._forget_if_idle(identity)
        self._next()

    def _next(self) -> None:
        """Give turns to those who wait, while there is room for the next."""
        while self.waiting:
            queue, identity = self._next_queue()
            # It is waited for, too: else smaller ones might pass it by for ever.
            if not self._fits(queue[0].views):
                return
            own = queue.popleft()
            self.waiting -= own.views
            self._begin(identity, own.views)
            own.turn.set_result(None)

    def _next_queue(self) -> tuple[collections.deque[_Waiting], str]:
        """Whose turn it is, where somebody waits."""
        for priority in range(2):
            wanting = [
                (each.working, each.last_turn, name)
                for name, each in self._callers.items()
                if each.waiting[priority]
            ]
            if wanting:
                # Whoever has the least in work; of equals, whose last turn is the longest ago.
                *_, identity = min(wanting)
                return self._callers[identity].waiting[priority], identity
        raise AssertionError("somebody waits")

    def _forget_if_idle(self, identity: str) -> None:
        if self._callers[identity].idle:
            del self._callers[identity]

    def _took(self, seconds: float) -> None:
        if not self._answer_seconds:
            self._answer_seconds = seconds
        off = seconds - self._answer_seconds
        self._answer_seconds += _NEWEST_SHARE * off
        self._deviation_seconds += _NEWEST_SHARE * (abs(off) - self._deviation_seconds)


def _refuse_late(seconds: float, needed: float) -> None:
    if seconds < needed:
        raise OverloadedError("too many requests are waiting")
