"""A peer in a process of its own that answers in lines of JSON; see generate_worker.serve_lines."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from captionserve_server.bench.rows import Decoding, Run

_STOP_SECONDS = 20.0
_ERROR_CHARACTERS = 2000


class PeerError(RuntimeError):
    """A system cannot be measured; the message says why."""


class WorkerPeer:
    """Drives one worker."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        """Wait until the worker has loaded its model.

        Args:
            process: the worker, with pipes for its lines.
            errors: the file its standard error goes to.

        Raises:
            PeerError: if it ends instead.
        """
        self._process = process
        self._errors = errors
        self._versions: dict[str, str] = self._read()["versions"]

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    @property
    def versions(self) -> dict[str, str]:
        """What the worker told of itself."""
        return self._versions

    def run(self, images: int, load: int, decoding: Decoding) -> Run:
        """Have the first `images` images captioned, `load` at once.

        Raises:
            PeerError: if the worker ends instead.
        """
        request = {"images": images, "load": load, "options": decoding.as_options()}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        token_ids = [tuple(tokens) for tokens in answer["token_ids"]]
        return Run(answer["seconds"], answer["latencies"], token_ids)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise PeerError(f"the worker ended\n{self._errors.read()[-_ERROR_CHARACTERS:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running_worker(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[WorkerPeer]:
    """A worker, ended on leaving.

    Args:
        command: what to run.
        environment: its environment; None for this process's.

    Raises:
        PeerError: if it ends before its model is loaded.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            # Ctrl-C is for us; we end the worker.
            start_new_session=True,
        )
        try:
            yield WorkerPeer(process, errors)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End a worker in the middle of whatever it does."""
    process.terminate()
    try:
        process.communicate(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
