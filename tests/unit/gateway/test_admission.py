"""Room for calls and bytes, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import pytest
from captionserve_server.core.errors import DeadlineExceededError, OverloadedError
from captionserve_server.gateway.admission import Room, Turns
from hypothesis import given, settings
from hypothesis import strategies as st

FAR = 1e9


def room(**bounds: int) -> Room:
    return Room(**{"calls": 4, "calls_each": 2, "megabytes": 4, "megabytes_each": 2, **bounds})


@pytest.mark.parametrize(
    ("taken", "wanted", "words"),
    [
        ([("a", 0), ("a", 0)], ("a", 0), "requests of this caller"),
        ([("a", 0), ("a", 0), ("b", 0), ("b", 0)], ("c", 0), "too many requests are"),
        ([("a", 2**21)], ("a", 1), "bytes of requests of this caller"),
        ([("a", 2**21), ("b", 2**21)], ("c", 1), "bytes of requests are"),
    ],
)
def test_there_is_room_for_so_much(
    taken: list[tuple[str, int]], wanted: tuple[str, int], words: str
) -> None:
    bounded = room()
    with ExitStack() as stack:
        for call in taken:
            stack.enter_context(bounded.taken(*call))
        with pytest.raises(OverloadedError, match=words), bounded.taken(*wanted):
            pass
    # All of it is given back, and what was refused took nothing.
    assert (bounded.all.calls, bounded.all.bytes) == (0, 0)
    with bounded.taken(*wanted):
        assert bounded.all.calls == 1


def test_what_is_smaller_than_it_might_have_been_makes_room() -> None:
    bounded = room()
    with bounded.taken("a", 2**21) as takes:
        takes(2**20)
        with bounded.taken("a", 2**20):
            assert bounded.all.bytes == 2**21
    assert bounded.all.bytes == 0


def test_one_callers_calls_do_not_take_anothers_room() -> None:
    bounded = room()
    with bounded.taken("a", 0), bounded.taken("a", 0), bounded.taken("b", 0):
        assert bounded.all.calls == 3


async def settle() -> None:
    """Let every task go on as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


class Queue:
    """Callers of Turns that stay at work until they are let go; `begun` has them in their order."""

    def __init__(self, at_once: int) -> None:
        self.turns = Turns(at_once)
        self.begun: list[str] = []
        self.going: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    def come(self, name: str, *, views: int = 1, bulk: bool = False, deadline: float = FAR) -> None:
        """A call whose identity is the name's first letter."""
        self.going[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._work(name, views, bulk, deadline))

    async def _work(self, name: str, views: int, bulk: bool, deadline: float) -> None:
        async with self.turns.turn(name[0], views=views, bulk=bulk, deadline=deadline):
            self.begun.append(name)
            await self.going[name].wait()

    async def finish(self, name: str) -> None:
        self.going[name].set()
        await settle()


def run(scenario: Callable[[Queue], Awaitable[Any]], at_once: int = 1) -> list[str]:
    async def go() -> list[str]:
        queue = Queue(at_once)
        await scenario(queue)
        for event in queue.going.values():
            event.set()
        await asyncio.gather(*queue.tasks.values(), return_exceptions=True)
        assert (queue.turns.working, queue.turns.waiting) == (0, 0)
        return queue.begun

    return asyncio.run(go())


def test_turns_are_fair_among_callers() -> None:
    async def scenario(queue: Queue) -> None:
        for name in ("a1", "a2", "a3", "a4", "b1", "c1"):
            queue.come(name)
            await settle()
        for name in ("a1", "b1", "c1", "a2", "a3"):
            await queue.finish(name)

    assert run(scenario) == ["a1", "b1", "c1", "a2", "a3", "a4"]


def test_parts_count_in_what_a_caller_has_in_work() -> None:
    async def scenario(queue: Queue) -> None:
        queue.come("a1", views=3)
        queue.come("b1")
        await settle()
        assert queue.turns.working == 4
        for name in ("a2", "b2"):
            queue.come(name)
            await settle()
        assert queue.turns.waiting == 2
        # B, whose three are one less than A's, is next twice.
        await queue.finish("b1")
        await queue.finish("b2")

    assert run(scenario, at_once=4) == ["a1", "b1", "b2", "a2"]


def test_smaller_ones_do_not_pass_a_larger_one_by() -> None:
    async def scenario(queue: Queue) -> None:
        for name, views in (("a1", 1), ("b1", 3), ("c1", 4), ("d1", 1)):
            queue.come(name, views=views)
            await settle()
        await queue.finish("a1")
        assert queue.begun == ["a1", "b1"]
        await queue.finish("b1")
        assert queue.begun == ["a1", "b1", "c1"]
        await queue.finish("c1")

    assert run(scenario, at_once=4) == ["a1", "b1", "c1", "d1"]


def test_what_is_larger_than_all_there_is_works_alone() -> None:
    async def scenario(queue: Queue) -> None:
        for name, views in (("a1", 1), ("b1", 9), ("c1", 1)):
            queue.come(name, views=views)
            await settle()
        assert (queue.turns.working, queue.turns.waiting) == (1, 10)
        await queue.finish("a1")
        assert (queue.turns.working, queue.turns.waiting) == (9, 1)
        await queue.finish("b1")

    assert run(scenario, at_once=4) == ["a1", "b1", "c1"]


def test_who_gives_up_at_the_head_lets_those_behind_it_in() -> None:
    async def scenario(queue: Queue) -> None:
        for name, views in (("a1", 3), ("b1", 2), ("c1", 1)):
            queue.come(name, views=views)
            await settle()
        assert queue.begun == ["a1"]
        queue.tasks["b1"].cancel()
        await settle()
        assert queue.begun == ["a1", "c1"]

    assert run(scenario, at_once=4) == ["a1", "c1"]


def test_whoever_has_the_least_in_work_is_next() -> None:
    async def scenario(queue: Queue) -> None:
        for name in ("a1", "a2", "a3", "a4", "b1", "b2"):
            queue.come(name)
            await settle()
        await queue.finish("a1")
        await queue.finish("a2")

    assert run(scenario, at_once=3)[:5] == ["a1", "a2", "a3", "b1", "a4"]


def test_bulk_comes_behind_all_that_is_interactive() -> None:
    async def scenario(queue: Queue) -> None:
        queue.come("a1")
        await settle()
        queue.come("b1", bulk=True)
        await settle()
        for name in ("a2", "a3"):
            queue.come(name)
            await settle()
        for name in ("a1", "a2", "a3"):
            await queue.finish(name)

    assert run(scenario) == ["a1", "a2", "a3", "b1"]


def test_who_leaves_the_queue_takes_no_turn() -> None:
    async def scenario(queue: Queue) -> None:
        for name in ("a1", "b1", "c1"):
            queue.come(name)
            await settle()
        queue.tasks["b1"].cancel()
        await settle()
        await queue.finish("a1")

    assert run(scenario) == ["a1", "c1"]


def test_a_turn_that_does_not_come_in_time_is_an_error() -> None:
    async def go() -> None:
        turns = Turns(1)
        clock = asyncio.get_running_loop().time
        async with turns.turn("a", views=1, bulk=False, deadline=FAR):
            with pytest.raises(DeadlineExceededError):
                async with turns.turn("b", views=1, bulk=False, deadline=clock() + 0.05):
                    pass
        assert (turns.working, turns.waiting) == (0, 0)

    asyncio.run(go())


async def answered(turns: Turns, seconds: float, *, times: int = 3) -> None:
    """So many answers that take so long."""
    for _ in range(times):
        async with turns.turn("a", views=1, bulk=False, deadline=FAR):
            await asyncio.sleep(seconds)


def test_who_cannot_be_answered_in_time_is_refused_at_once() -> None:
    async def go() -> None:
        turns = Turns(1)
        clock = asyncio.get_running_loop().time
        await answered(turns, 0.05)
        async with turns.turn("a", views=1, bulk=False, deadline=FAR):
            begin = clock()
            with pytest.raises(OverloadedError):
                async with turns.turn("b", views=1, bulk=False, deadline=begin + 0.06):
                    pass
            assert clock() - begin < 0.05

    asyncio.run(go())


def test_where_nobody_waits_nobody_is_refused_for_what_took_long_once() -> None:
    async def go() -> None:
        turns = Turns(1)
        await answered(turns, 0.1)
        async with turns.turn(
            "a", views=1, bulk=False, deadline=asyncio.get_running_loop().time() + 0.01
        ):
            pass

    asyncio.run(go())


def test_a_turn_that_comes_too_late_for_an_answer_is_given_to_the_next() -> None:
    async def go() -> list[str]:
        turns = Turns(1)
        clock = asyncio.get_running_loop().time
        begun: list[str] = []
        await answered(turns, 0.05)

        async def work(name: str, deadline: float) -> None:
            async with turns.turn(name, views=1, bulk=False, deadline=deadline):
                begun.append(name)
                await asyncio.sleep(0)

        async with turns.turn("a", views=1, bulk=False, deadline=FAR):
            late = asyncio.create_task(work("b", clock() + 0.2))
            next_one = asyncio.create_task(work("c", FAR))
            await asyncio.sleep(0.16)  # Longer than it was reckoned to take.
        await next_one
        with pytest.raises(OverloadedError):
            await late
        return begun

    assert asyncio.run(go()) == ["c"]


def test_what_is_given_up_late_counts_as_taking_long() -> None:
    async def go() -> None:
        turns = Turns(1)
        clock = asyncio.get_running_loop().time

        async def give_up() -> None:
            async with turns.turn("a", views=1, bulk=False, deadline=FAR):
                await asyncio.sleep(0.02)
                raise DeadlineExceededError("too late")

        await answered(turns, 0.0)
        await asyncio.gather(*(give_up() for _ in range(20)), return_exceptions=True)
        async with turns.turn("a", views=1, bulk=False, deadline=FAR):
            with pytest.raises(OverloadedError):
                async with turns.turn("b", views=1, bulk=False, deadline=clock() + 0.02):
                    pass

    asyncio.run(go())


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.booleans(), st.sampled_from(["come", "go", "leave"])),
        max_size=60,
    ),
    at_once=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_no_turn_is_lost_whatever_happens(steps: list[tuple[str, bool, str]], at_once: int) -> None:
    async def go() -> None:
        queue = Queue(at_once)
        for number, (identity, bulk, what) in enumerate(steps):
            running = [name for name, task in queue.tasks.items() if not task.done()]
            if what == "come":
                queue.come(f"{identity}{number}", bulk=bulk)
            elif running and what == "go":
                queue.going[running[0]].set()
            elif running:
                queue.tasks[running[-1]].cancel()
            await settle()
            live = sum(not task.done() for task in queue.tasks.values())
            # Nobody waits while there is a turn to be had.
            assert queue.turns.working == min(at_once, live)
            assert queue.turns.waiting == live - queue.turns.working
        for event in queue.going.values():
            event.set()
        await asyncio.gather(*queue.tasks.values(), return_exceptions=True)
        assert (queue.turns.working, queue.turns.waiting) == (0, 0)

    asyncio.run(go())


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(1, 6),
            st.booleans(),
            st.sampled_from(["come", "come", "go", "leave"]),
        ),
        max_size=40,
    ),
    at_once=st.integers(1, 5),
)
@settings(max_examples=100, deadline=None)
def test_no_more_views_are_at_work_than_fit_and_none_is_lost(
    steps: list[tuple[str, int, bool, str]], at_once: int
) -> None:
    async def go() -> None:
        queue = Queue(at_once)
        sizes: dict[str, int] = {}
        for number, (identity, views, bulk, what) in enumerate(steps):
            running = [name for name, task in queue.tasks.items() if not task.done()]
            if what == "come":
                sizes[f"{identity}{number}"] = views
                queue.come(f"{identity}{number}", views=views, bulk=bulk)
            elif running and what == "go":
                queue.going[running[0]].set()
            elif running:
                queue.tasks[running[-1]].cancel()
            await settle()
            live = {name for name, task in queue.tasks.items() if not task.done()}
            at_work = live & set(queue.begun)
            assert queue.turns.working == sum(sizes[name] for name in at_work)
            assert queue.turns.waiting == sum(sizes[name] for name in live - at_work)
            assert queue.turns.working <= at_once or len(at_work) == 1
            # Of those who wait at least one does not fit.
            largest = max((sizes[name] for name in live - at_work), default=None)
            if largest is not None:
                assert queue.turns.working + min(largest, at_once) > at_once
        for event in queue.going.values():
            event.set()
        await asyncio.gather(*queue.tasks.values(), return_exceptions=True)
        assert (queue.turns.working, queue.turns.waiting) == (0, 0)
        assert not queue.turns._callers

    asyncio.run(go())
