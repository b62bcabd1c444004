"""Versions side by side, taken in and taken back while callers are answered."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from captionserve import CaptionClient, CaptionError
from captionserve_server.runtime.model_repository import DECODER, MODELS
from PIL import Image

from tests.faults.served import Served, serving, wait_until
from tests.reference import picture

# Of other weights and another image size.
OLD, NEW = "projected", "deit"


def add_version(repository: Path, source: Path, version: int) -> None:
    """What `export --version` does: the version's folders of every model."""
    for model in MODELS:
        shutil.copytree(source / model / "1", repository / model / str(version))


def remove_version(repository: Path, version: int) -> None:
    for model in MODELS:
        shutil.rmtree(repository / model / str(version))


def reload(served: Served) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "captionserve_server.cli.main", "reload"),
            *("--ready-file", str(served.ready_file)),
        ],
        check=True,
        timeout=60,
    )


def versions(client: CaptionClient) -> list[int]:
    return [model.version for model in client.models().models]


def text_of(target: str, image: Image.Image, version: int) -> str:
    """What a version says."""
    with CaptionClient(target, timeout=60, model_version=version) as client:
        return client.caption(image, bypass_cache=True).text


def assert_not_found(target: str, image: Image.Image, version: int) -> None:
    with pytest.raises(CaptionError) as missing:
        text_of(target, image, version)
    assert missing.value.code is grpc.StatusCode.NOT_FOUND


@contextmanager
def asked_all_the_time(target: str, image: Image.Image) -> Iterator[list[tuple[int, str]]]:
    """Callers meanwhile; which version has said what."""
    answers: list[tuple[int, str]] = []
    ended = threading.Event()

    def ask() -> None:
        with CaptionClient(target, timeout=60) as client:
            while not ended.is_set():
                result = client.caption(image, bypass_cache=True)
                answers.append((result.model_version, result.text))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)


def test_versions_come_and_go_without_one_wrong_answer(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(model_repository(OLD), repository)
    image = picture(5)
    with serving(repository, tmp_path) as served:
        target = served.report["grpc"]
        with CaptionClient(target, timeout=60) as client:
            assert versions(client) == [1]
            said = {1: text_of(target, image, 1)}
            assert_not_found(target, image, 2)

            with asked_all_the_time(target, image) as answers:
                add_version(repository, model_repository(NEW), 2)
                reload(served)
                wait_until(lambda: versions(client) == [2, 1])
                said[2] = text_of(target, image, 2)
                assert text_of(target, image, 1) == said[1]
                wait_until(lambda: answers[-1][0] == 2)

                # One that cannot be loaded changes nothing and says why.
                add_version(repository, model_repository(NEW), 3)
                (repository / DECODER / "3" / "step.onnx").write_bytes(b"no graph")
                triton = served.report["pids"]["triton"]
                reload(served)
                wait_until(lambda: "is not taken in" in served.log.read_text())
                assert versions(client) == [2, 1]
                assert served.report["pids"]["triton"] == triton
                remove_version(repository, 3)

                # Back to the first by removing the second.
                remove_version(repository, 2)
                reload(served)
                wait_until(lambda: versions(client) == [1])
                wait_until(lambda: answers[-1][0] == 1)
                assert_not_found(target, image, 2)
        assert said[1] != said[2]
        assert set(answers) == set(said.items())
