"""A captioner in another process: its answers, its errors and its end."""

from __future__ import annotations

import os
import sys

import psutil
import pytest
from captionserve_server.bench.peers.worker import running_worker
from captionserve_server.bench.rows import Load, Options, Run

LOAD = Load(1, "batch")


class Echo:
    """Says what it was asked for."""

    def __init__(self) -> None:
        sys.stdout.write("a library greets\n")
        self.versions = {"library": "1.0"}

    def run(self, images: int, load: Load, options: Options) -> Run:
        os.write(2, b"a library chatters\n")
        if not images:
            raise ValueError("no images")
        return Run(0.5, [0.25] * images, [(image, options["num_beams"]) for image in range(images)])


class Dies(Echo):
    """Ends its process."""

    def run(self, images: int, load: Load, options: Options) -> Run:
        os._exit(1)


def no_such_model() -> Echo:
    raise FileNotFoundError("no such model")


def test_a_worker_answers_quietly_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with running_worker(Echo) as worker:
        assert worker.versions == {"library": "1.0"}
        assert worker.pid != os.getpid()
        process = psutil.Process(worker.pid)
        run = worker.run(2, LOAD, {"num_beams": 4})
        assert run == Run(0.5, [0.25, 0.25], [(0, 4), (1, 4)])
    assert not process.is_running()
    assert capfd.readouterr() == ("", "")


def test_a_worker_ends_with_an_error_of_ours() -> None:
    processes: list[psutil.Process] = []

    def interrupted() -> None:
        with running_worker(Echo) as worker:
            processes.append(psutil.Process(worker.pid))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not processes[0].is_running()


def test_what_fails_in_a_worker_is_raised_here_and_the_worker_goes_on() -> None:
    with running_worker(Echo) as worker:
        with pytest.raises(ValueError, match="no images"):
            worker.run(0, LOAD, {"num_beams": 4})
        assert worker.run(1, LOAD, {"num_beams": 4}).token_ids == [(0, 4)]


def test_what_cannot_be_loaded_says_why() -> None:
    with pytest.raises(FileNotFoundError, match="no such model"), running_worker(no_such_model):
        pass


def test_a_worker_that_dies_is_told_of() -> None:
    with (
        running_worker(Dies) as worker,
        pytest.raises(RuntimeError, match="terminated abruptly"),
    ):
        worker.run(1, LOAD, {"num_beams": 4})
