"""Threads that never die silently."""

from __future__ import annotations

import threading
import weakref
from functools import partial

import pytest
from captionserve_server.core.engine.worker import Worker, WorkerPool
from captionserve_server.core.errors import ModelUnavailableError

WAIT_SECONDS = 30.0


def test_a_body_that_raises_is_told_of() -> None:
    told: list[BaseException] = []

    def body() -> None:
        raise KeyError("a bug")

    assert Worker("test", body, told.append).join(WAIT_SECONDS)
    assert [type(error) for error in told] == [KeyError]


def test_jobs_are_done_in_their_order_and_the_rest_at_the_end() -> None:
    done: list[int] = []
    begin = threading.Event()
    pool = WorkerPool("test", 1, lambda error: None)

    def wait() -> None:
        assert begin.wait(WAIT_SECONDS)

    pool.submit(wait, lambda error: None)
    for number in range(10):
        pool.submit(partial(done.append, number), lambda error: None)
    begin.set()
    assert pool.close(WAIT_SECONDS)
    assert done == list(range(10))
    with pytest.raises(ModelUnavailableError):
        pool.submit(lambda: None, lambda error: None)


def test_a_thread_without_work_holds_nothing_of_its_last_job() -> None:
    class Image:
        """Stands for many megabytes."""

    image, done = Image(), threading.Event()
    freed = weakref.finalize(image, done.set)
    pool = WorkerPool("test", 1, lambda error: None)
    pool.submit(partial(lambda image: None, image), lambda error: None)
    del image
    assert done.wait(WAIT_SECONDS)
    assert not freed.alive
    assert pool.close(WAIT_SECONDS)


def test_a_job_that_fails_is_its_own_affair() -> None:
    failed: list[Exception] = []
    died: list[BaseException] = []
    done = threading.Event()
    pool = WorkerPool("test", 1, died.append)
    pool.submit(lambda: [][0], failed.append)
    pool.submit(done.set, failed.append)
    assert done.wait(WAIT_SECONDS)
    assert pool.close(WAIT_SECONDS)
    assert [type(error) for error in failed] == [IndexError]
    assert not died


def test_a_failure_that_cannot_be_told_ends_the_thread_loudly() -> None:
    died = threading.Event()

    def untold(error: Exception) -> None:
        raise RuntimeError("nobody listens") from error

    pool = WorkerPool("test", 1, lambda error: died.set())
    pool.submit(lambda: [][0], untold)
    assert died.wait(WAIT_SECONDS)


def test_a_thread_that_asks_for_its_own_end_does_not_wait_for_itself() -> None:
    ended: list[bool] = []
    workers: list[Worker] = []
    made = threading.Event()

    def body() -> None:
        assert made.wait(WAIT_SECONDS)
        ended.append(workers[0].join(WAIT_SECONDS))

    workers.append(Worker("test", body, lambda error: None))
    made.set()
    assert workers[0].join(WAIT_SECONDS)
    assert ended == [False]
