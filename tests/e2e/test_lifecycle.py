"""Starting and ending: what `captionserve serve` promises about files, ports and processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from captionserve import CaptionClient
from captionserve_server.runtime.graph_format import GraphFormat
from captionserve_server.runtime.model_repository import MODELS
from captionserve_server.serving.launch import launched_service

from tests.conftest import DEMO_FOLDER
from tests.faults.served import WAIT_SECONDS, wait_until
from tests.reference import picture

NAME = "projected"
# The last one is a byte that is no UTF-8.
HOSTILE = "a b'c\"d;e $(f) é日 [x] \udcff"


def leftovers() -> set[Path]:
    """Temporary folders and shared memory regions of ours."""
    folders = (Path(tempfile.gettempdir()), Path("/dev/shm"))
    return {path for folder in folders for path in folder.glob("captionserve-triton-*")}


def is_listening(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_behind(
    number: signal.Signals, model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    ready_file = tmp_path / "ready.json"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "captionserve_server.cli.main", "serve"),
            *("--model-repository", str(model_repository(NAME))),
            *("--listen", "127.0.0.1:0", "--ready-file", str(ready_file)),
        ],
        start_new_session=True,
    )
    try:
        wait_until(ready_file.exists)
        report = json.loads(ready_file.read_text())
        prefix = prefix_of_files(report["pids"]["triton"])
        assert any(path.name.startswith(prefix) for path in leftovers())
        addresses = [value for value in report.values() if isinstance(value, str)]
        assert all(is_listening(address) for address in addresses)
        assert report["pids"]["gateway"] == process.pid
        family = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(True))]
        assert report["pids"]["triton"] in family
        with CaptionClient(report["grpc"]) as client:
            assert client.caption(picture(1)).captions

        # As a terminal does with Ctrl-C: to the whole process group.
        os.killpg(process.pid, number)

        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
    assert not ready_file.exists()
    assert not any(psutil.pid_exists(pid) for pid in family)
    assert not any(is_listening(address) for address in addresses)
    # Other services on this machine have files of their own.
    assert [path for path in leftovers() if path.name.startswith(prefix)] == []


def prefix_of_files(triton: int) -> str:
    """How the names begin of what a Triton of ours keeps in shared memory and beside it."""
    option = "shm-region-prefix-name="
    command = psutil.Process(triton).cmdline()
    return next(word.partition(option)[2] for word in command if option in word)


def test_a_signal_while_starting_ends_it_too(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    before = leftovers()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "captionserve_server.cli.main", "serve"),
            *("--model-repository", str(model_repository(NAME)), "--listen", "127.0.0.1:0"),
        ]
    )
    try:
        wait_until(lambda: leftovers() - before)
        wait_until(lambda: psutil.Process(process.pid).children())
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
    wait_until(lambda: leftovers() == before)


def test_triton_ends_with_a_killed_gateway(model_repository: Callable[[str], Path]) -> None:
    before = leftovers()
    service = launched_service(model_repository(NAME))
    report = service.__enter__()
    gateway = psutil.Process(report.pids["gateway"])
    family = gateway.children(recursive=True)
    assert family

    gateway.kill()

    service.__exit__(None, None, None)
    wait_until(lambda: not any(process.is_running() for process in family))
    # Who is killed cannot tidy up; the next service does.
    assert leftovers() - before
    with launched_service(model_repository(NAME)):
        pass
    assert leftovers() <= before


def served_to_the_end(repository: Path) -> subprocess.CompletedProcess[str]:
    """`serve`, which ends by itself."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "captionserve_server.cli.main", "serve"),
            *("--model-repository", str(repository), "--listen", "127.0.0.1:0"),
        ],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


def test_a_repository_that_does_not_load_is_an_error_in_words(tmp_path: Path) -> None:
    for model in MODELS:
        broken = tmp_path / "repository" / model
        broken.mkdir(parents=True)
        (broken / "config.pbtxt").write_text('backend: "no such backend"\n')
    process = served_to_the_end(broken.parent)
    assert process.returncode == 4
    assert "error: Triton ended while starting" in process.stderr
    assert "Traceback" not in process.stderr


DIES = "import os, signal\n\ndef die(*arguments):\n    os.kill(os.getpid(), signal.SIGKILL)\n\n"


@pytest.mark.parametrize(
    "model",
    [
        f"{DIES}die()",
        f"{DIES}class TritonPythonModel:\n    initialize = die",
        "import os\n\nos._exit(0)",
    ],
    ids=["when imported", "when initialised", "without an error"],
)
def test_a_model_that_dies_at_the_start_ends_it_at_once(
    model: str, model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(model_repository(NAME), repository)
    (repository / "captioner" / "1" / "model.py").write_text(model)
    process = served_to_the_end(repository)
    assert process.returncode == 4
    # Whoever is first to notice: we, or Triton.
    ours = "error: the process of captioner has ended by itself, while Triton"
    tritons = "Stub process 'captioner_0_0' is not healthy"
    assert ours in process.stderr or tritons in process.stderr
    assert "Traceback" not in process.stderr


def test_repository_and_temporary_folder_may_have_any_name(
    model_repository: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = tmp_path / HOSTILE
    (hostile / "temporary").mkdir(parents=True)
    repository = hostile / "repository"
    shutil.copytree(model_repository(NAME), repository)
    before = sorted(repository.rglob("*"))
    monkeypatch.setenv("TMPDIR", str(hostile / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with (
        launched_service(repository, timeout_seconds=WAIT_SECONDS) as service,
        CaptionClient(service.grpc) as client,
    ):
        assert client.caption(picture(1)).captions
        assert sorted(repository.rglob("*")) == before
    assert list((hostile / "temporary").glob("captionserve-*")) == []


@pytest.mark.parametrize("graph_format", GraphFormat)
def test_checkpoint_output_and_image_may_have_any_name(
    graph_format: GraphFormat, checkpoint_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    hostile = tmp_path / HOSTILE
    checkpoint, repository, image = (
        hostile / name for name in ("from", HOSTILE, "image \udcfe.png")
    )
    shutil.copytree(checkpoint_folder(NAME), checkpoint)
    picture(1).save(image)
    command = [sys.executable, "-m", "captionserve_server.cli.main"]
    subprocess.run(
        [
            *(*command, "export", str(checkpoint), "--output", str(repository)),
            *("--format", graph_format.value),
        ],
        check=True,
        timeout=WAIT_SECONDS,
    )
    if graph_format is GraphFormat.ONNX:  # The other one is for Triton.
        subprocess.run(
            [*command, "caption", str(image), "--local", str(repository)],
            check=True,
            timeout=WAIT_SECONDS,
        )
    with (
        launched_service(repository, timeout_seconds=WAIT_SECONDS) as service,
        CaptionClient(service.grpc) as client,
    ):
        assert client.caption(image).captions


def test_an_older_export_is_refused_by_name_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "decoder_step").mkdir()
    process = served_to_the_end(tmp_path)
    assert process.returncode == 4
    assert "older export (it holds decoder_step): export the checkpoint again" in process.stderr


def test_an_export_that_said_less_is_refused_before_anything_is_started(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(model_repository(NAME), repository)
    path = repository / "decoder" / "1" / "bundle.json"
    bundle = json.loads(path.read_text())
    del bundle["rules"]
    path.write_text(json.dumps(bundle))
    process = served_to_the_end(repository)
    assert process.returncode == 4
    assert "version 1 of this model repository was written by an older export" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_missing_tritonserver_is_an_error_in_words(
    model_repository: Callable[[str], Path], tmp_path: Path
) -> None:
    process = subprocess.run(
        [
            *(sys.executable, "-m", "captionserve_server.cli.main", "serve"),
            *("--model-repository", str(model_repository(NAME))),
            *("--tritonserver", str(tmp_path / "tritonserver")),
        ],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert process.returncode == 2
    assert "--tritonserver" in process.stderr
    assert "Traceback" not in process.stderr


def test_an_installed_tritonserver_is_used_when_given(
    model_repository: Callable[[str], Path],
) -> None:
    from captionserve_server.serving.installation import find_triton

    binary = find_triton().binary
    with launched_service(model_repository(NAME), "--tritonserver", str(binary)) as service:
        assert Path(psutil.Process(service.pids["triton"]).exe()) == binary.resolve()
        with CaptionClient(service.grpc) as client:
            assert client.caption(DEMO_FOLDER / "images" / _first_image()).captions


def _first_image() -> str:
    captions: dict[str, str] = json.loads((DEMO_FOLDER / "images" / "captions.json").read_text())
    return next(iter(captions))
