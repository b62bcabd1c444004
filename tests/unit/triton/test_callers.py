"""Callers and their watch: one last answer each, and nobody asked after it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from captionserve_server.core.errors import OverloadedError

from tests.unit.triton.answered import WAIT_SECONDS, error_in, wait_until
from tests.unit.triton.stand_in import InferenceResponse, Logger, request_of


class Watched:
    """A watch, and whom it says to have gone."""

    def __init__(self) -> None:
        from captionserve_server.triton.callers import CallerWatch

        self.gone: list[Any] = []
        self.died: list[BaseException] = []
        self.on_gone: Callable[[Any], Any] = self.gone.append
        self.watch = CallerWatch(self.died.append, lambda caller: self.on_gone(caller))

    def add(self, name: str = "") -> tuple[Any, Any]:
        """One more caller, and the sender of its request."""
        caller, sender = caller_of(name)
        self.watch.add(caller)
        return caller, sender

    @property
    def callers(self) -> list[Any]:
        """Those who are looked after."""
        return self.watch._callers


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.watch.close(WAIT_SECONDS)
    assert not made.died


def caller_of(name: str = "", timeout: int = 0) -> tuple[Any, Any]:
    from captionserve_server.triton.callers import Caller

    request = request_of(name, timeout)
    return Caller(request), request.sender


class Turnstile:
    """A lock that says whether somebody waits for it."""

    def __init__(self) -> None:
        self.has_queue = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.has_queue.set()
            self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


def fails(*arguments: Any) -> Any:
    raise RuntimeError("it cannot be asked")


def test_a_time_limit_is_a_deadline_and_none_is_none() -> None:
    before = time.monotonic()
    caller, _ = caller_of(timeout=5_000_000)
    assert before + 5 <= caller.deadline <= time.monotonic() + 5
    assert math.isinf(caller_of()[0].deadline)


def test_a_second_last_answer_is_not_sent() -> None:
    caller, sender = caller_of()
    part, last = InferenceResponse(), InferenceResponse()
    caller.send(part)
    assert not caller.answered
    caller.finish(last)
    caller.finish(InferenceResponse())
    assert sender.responses == [part, last]
    assert caller.answered


def test_an_end_without_an_answer_is_an_end() -> None:
    caller, sender = caller_of()
    caller.finish(None)
    assert sender.final.is_set()
    assert sender.responses == []


def test_an_answer_that_could_not_be_sent_counts_as_one() -> None:
    caller, sender = caller_of()
    sender.fails = True
    with pytest.raises(RuntimeError):
        caller.finish(InferenceResponse())
    assert caller.answered
    # The stand-in's sender would refuse it.
    caller.finish(InferenceResponse())


def test_an_error_that_cannot_be_sent_is_logged_and_not_raised() -> None:
    caller, sender = caller_of()
    sender.fails = True
    caller.fail(OverloadedError("no room"))
    assert caller.answered
    line = "an error could not be sent: RuntimeError: the response cannot be sent"
    assert Logger.lines == [line]
    other, sender = caller_of()
    other.fail(OverloadedError("no room"))
    assert error_in(sender.responses[0]).message == "no room"


def test_a_caller_is_asked_for_until_it_has_gone() -> None:
    caller, sender = caller_of()
    assert caller.look()
    sender.cancelled = True
    assert not caller.look()
    assert caller.has_gone
    # Gone is gone, whatever Triton says later.
    sender.cancelled = False
    assert not caller.look()
    assert caller.has_gone


def test_triton_is_not_asked_for_a_caller_that_was_answered() -> None:
    caller, sender = caller_of()
    caller.finish(None)
    sender.cancelled = True
    # The stand-in's sender would refuse to say.
    assert not caller.look()
    assert not caller.has_gone


def test_no_last_answer_leaves_while_triton_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    caller, sender = caller_of()
    caller._asking = turnstile = Turnstile()
    asked, say = threading.Event(), threading.Event()

    def is_cancelled() -> bool:
        asked.set()
        assert say.wait(WAIT_SECONDS)
        return bool(sender.final.is_set())

    monkeypatch.setattr(sender, "is_cancelled", is_cancelled)
    looking = threading.Thread(target=caller.look)
    looking.start()
    assert asked.wait(WAIT_SECONDS)
    finishing = threading.Thread(target=caller.finish, args=(None,))
    finishing.start()
    wait_until(lambda: sender.final.is_set() or turnstile.has_queue.is_set())
    say.set()
    looking.join(WAIT_SECONDS)
    finishing.join(WAIT_SECONDS)
    assert not caller.has_gone
    assert sender.final.is_set()


def test_who_has_gone_is_told_of_once_and_no_longer_watched(watched: Watched) -> None:
    gone, sender = watched.add()
    stays, _ = watched.add()
    sender.cancelled = True
    wait_until(lambda: watched.callers == [stays])
    assert watched.gone == [gone]
    assert gone.has_gone
    assert not stays.has_gone


def test_who_was_answered_is_no_longer_watched(watched: Watched) -> None:
    caller, _ = watched.add()
    caller.finish(None)
    wait_until(lambda: not watched.callers)
    assert not watched.gone


def test_who_is_cancelled_by_name_has_gone_and_nobody_else(watched: Watched) -> None:
    named, _ = watched.add("this")
    others = [watched.add(name)[0] for name in ("that", "")]
    watched.watch.cancel("another")
    watched.watch.cancel("this")
    assert named.has_gone
    wait_until(lambda: watched.callers == others)
    assert watched.gone == [named]


def test_who_has_no_name_cannot_be_cancelled_by_it(watched: Watched) -> None:
    nameless, _ = watched.add()
    watched.watch.cancel("")
    assert not nameless.has_gone


def test_who_cannot_be_asked_for_costs_nobody_the_watch(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captionserve_server.triton.callers import Caller

    dark = request_of()
    monkeypatch.setattr(dark.sender, "is_cancelled", fails)
    caller = Caller(dark)
    watched.watch.add(caller)
    other, sender = watched.add()
    sender.cancelled = True
    wait_until(lambda: not watched.callers)
    assert watched.gone == [other]
    # It is taken to wait.
    assert not caller.has_gone
    assert Logger.lines == ["asking for a caller: RuntimeError: it cannot be asked"]


def test_one_of_whom_cannot_be_told_costs_nobody_the_watch(watched: Watched) -> None:
    watched.on_gone = fails
    _, sender = watched.add()
    sender.cancelled = True
    wait_until(lambda: not watched.callers)
    watched.on_gone = watched.gone.append
    other, sender = watched.add()
    sender.cancelled = True
    wait_until(lambda: watched.gone == [other])
    assert len(Logger.lines) == 1


def test_the_watch_ends_when_it_is_closed_with_callers_or_without() -> None:
    for callers in (0, 1):
        watched = Watched()
        for _ in range(callers):
            watched.add()
        watched.watch.close(WAIT_SECONDS)
        assert watched.watch._worker.join(0)
