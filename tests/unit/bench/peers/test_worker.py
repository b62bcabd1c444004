"""A captioner in another process: its answers, its errors and its end."""

from __future__ import annotations

import os
import sys

import psutil
import pytest
from captionserve_server.bench.peers.system import Load, Options, System, TokenIds
from captionserve_server.bench.peers.worker import running_worker

LOAD = Load(2, "batch")
OPTIONS = {"num_beams": 4}
FILES = [b"1", b"2"]


class Echo(System):
    """Says what it was asked for."""

    def __init__(self) -> None:
        sys.stdout.write("a library greets\n")

    def caption(self, files: list[bytes], options: Options, streamed: bool) -> list[TokenIds]:
        os.write(2, b"a library chatters\n")
        return [(int(file), options["num_beams"]) for file in files]


class Dies(Echo):
    """Ends its process."""

    def caption(self, files: list[bytes], options: Options, streamed: bool) -> list[TokenIds]:
        os._exit(1)


def no_such_model() -> Echo:
    raise FileNotFoundError("no such model")


def test_a_worker_answers_quietly_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with running_worker(Echo) as worker:
        assert worker.pid != os.getpid()
        process = psutil.Process(worker.pid)
        assert worker.run(FILES, LOAD, OPTIONS).token_ids == [(1, 4), (2, 4)]
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
        with pytest.raises(ValueError, match="no number"):
            worker.run([b"no number"], LOAD, OPTIONS)
        assert worker.run(FILES, LOAD, OPTIONS).token_ids == [(1, 4), (2, 4)]


def test_what_cannot_be_loaded_says_why() -> None:
    with pytest.raises(FileNotFoundError, match="no such model"), running_worker(no_such_model):
        pass


def test_a_worker_that_dies_is_told_of() -> None:
    with (
        running_worker(Dies) as worker,
        pytest.raises(RuntimeError, match="terminated abruptly"),
    ):
        worker.run(FILES, LOAD, OPTIONS)
