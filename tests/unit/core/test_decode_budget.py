"""Images share memory while they are decoded; who has given up is let go."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from captionserve_server.core.decode_budget import DecodeBudget
from captionserve_server.core.errors import CancelledError, DeadlineExceededError

WAIT_SECONDS = 30.0


def until_waiting(budget: DecodeBudget, count: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while budget.waiting != count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_no_more_bytes_are_in_use_than_there_are() -> None:
    budget, lock = DecodeBudget(100), threading.Lock()
    used, most = 0, 0

    def work(size: int) -> None:
        nonlocal used, most
        with budget.reserved(size):
            with lock:
                used += size
                most = max(most, used)
            time.sleep(0)
            with lock:
                used -= size

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [30, 50, 70, 100, 10] * 40))
    assert 0 < most <= 100


def test_an_image_that_takes_more_than_all_is_decoded_alone() -> None:
    budget = DecodeBudget(100)
    with ThreadPoolExecutor(1) as pool:
        with budget.reserved(1000):
            other = pool.submit(lambda: budget.reserved(1).__enter__())
            until_waiting(budget, 1)
        other.result(WAIT_SECONDS)


@pytest.mark.parametrize("expected", [CancelledError, DeadlineExceededError])
def test_who_gives_up_while_waiting_is_let_go(expected: type[Exception]) -> None:
    budget, gone = DecodeBudget(100), threading.Event()
    deadline = float("inf") if expected is CancelledError else time.monotonic() + 0.05

    def wait() -> None:
        with budget.reserved(60, gone.is_set, deadline):
            pass

    with ThreadPoolExecutor(1) as pool, budget.reserved(60):
        waiting = pool.submit(wait)
        if expected is CancelledError:
            until_waiting(budget, 1)
            gone.set()
        with pytest.raises(expected):
            waiting.result(WAIT_SECONDS)
        assert budget.waiting == 0
        # Nobody waits before this one any more.
        with budget.reserved(40):
            pass
