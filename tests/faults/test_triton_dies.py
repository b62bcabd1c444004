"""Triton or a process of its models killed: the service ends, says so, and leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from captionserve import CaptionClient

from tests.reference import picture

WAIT_SECONDS = 60.0


@pytest.mark.parametrize("victim", ["Triton", "a model's process"])
def test_the_service_ends_with_its_triton(
    victim: str, model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    before = shared_memory()
    ready_file = tmp_path / "ready.json"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "captionserve_server.cli.main", "serve"),
            *("--model-repository", str(model_repository("projected"))),
            *("--listen", "127.0.0.1:0", "--ready-file", str(ready_file)),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while not ready_file.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        report = json.loads(ready_file.read_text())
        family = psutil.Process(process.pid).children(recursive=True)
        with CaptionClient(report["grpc"]) as client:
            assert client.caption(picture(1)).captions

        triton = psutil.Process(report["pids"]["triton"])
        killed = triton if victim == "Triton" else triton.children()[0]
        killed.kill()

        _, errors = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 1
    assert f"error: {victim} ended by itself" in errors
    assert "Traceback" not in errors
    assert not ready_file.exists()
    _, left = psutil.wait_procs(family, WAIT_SECONDS)
    assert left == []
    assert shared_memory() == before


def shared_memory() -> set[Path]:
    """Shared memory regions of ours."""
    return set(Path("/dev/shm").glob("captionserve-triton-*"))
