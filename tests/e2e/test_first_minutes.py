"""What a newcomer meets: setting up, the demo's words, errors with a way out, completion."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

ROOT = Path(__file__).parent.parent.parent
COMMAND = Path(sys.executable).parent / "captionserve"
IMAGE = str(ROOT / "demo" / "images" / "crown.png")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command as it is installed, not as a module."""
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "500", **variables},
    )


def said(process: subprocess.CompletedProcess[str]) -> str:
    """The sentence on standard error, also out of a box, and nothing that is no sentence."""
    assert "Traceback" not in process.stderr
    assert not re.search(r"^[EWI]\d{4} ", process.stderr, re.MULTILINE), process.stderr
    lines = [line.strip("│ ") for line in process.stderr.splitlines()]
    (sentence,) = (line for line in lines if line.startswith(("error:", "Invalid value", IMAGE)))
    return sentence


@contextlib.contextmanager
def web_server() -> Iterator[str]:
    """Something that listens and is no captionserve."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout as far as `make setup` looks at it."""
    for name in ("Makefile", "constraints.txt", "client/pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "server_tools").mkdir()
    shutil.copy(ROOT / "server_tools" / "pyproject.toml", tmp_path / "server_tools")
    return tmp_path


def make(project: Path, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which("make")
    assert found
    return subprocess.run(
        [found, "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=project,
        env={"PATH": path},
    )


@pytest.mark.parametrize("named", [True, False])
def test_another_python_is_an_error_with_a_way_out(project: Path, named: bool) -> None:
    programs = project / "bin"
    programs.mkdir()
    old = programs / "python3"
    # What any Python does of a version that is not supported.
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("sh", "sed"):
        (programs / name).symlink_to(shutil.which(name) or "")
    process = make(project, *([f"PYTHON={old}"] if named else []), path=str(programs))
    assert process.returncode == 2
    sentence, *others = process.stderr.splitlines()
    assert sentence.startswith("error: Python 3.10, 3.11 or 3.12 is needed, and ")
    assert (f"{old} is none of them" if named else "none is on PATH") in sentence
    assert sentence.endswith("make demo PYTHON=/path/to/python3.11")
    assert all(line.startswith("make") for line in others)
    assert not (project / ".venv").exists()


def test_setting_up_says_so_first(project: Path) -> None:
    process = subprocess.run(
        ["make", "--dry-run", "demo", f"PYTHON={sys.executable}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=project,
    )
    text = process.stdout
    assert text.index("setting up .venv") < text.index("-m venv") < text.index("pip install")
    assert "--quiet" not in text


def test_the_demo_says_what_it_does_at_every_moment_and_captions_each_image() -> None:
    process = run("demo")
    assert process.returncode == 0, process.stderr
    begins = [
        "exports demo/checkpoint, serves it, captions 7 images, and stops again",
        "importing PyTorch ...",
        "loading the checkpoint ...",
        "exporting model.onnx of vision_encoder ...",
        "comparing the graphs with PyTorch ...",
        "starting Triton and the gateway ...",
        "captioning with a service on 127.0.0.1:",
        "stopping the service ...",
        "done, and all is stopped",
    ]
    places = [process.stderr.index(begin) for begin in begins]
    assert places == sorted(places)
    captions = json.loads((ROOT / "demo" / "images" / "captions.json").read_text())
    lines = process.stdout.splitlines()
    assert len(lines) == len(captions) == 7
    for line, (name, caption) in zip(lines, captions.items(), strict=True):
        assert re.fullmatch(rf"{re.escape(name)}: {re.escape(caption)} \(score -?\d.*\)", line)


@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen", "--health-listen"])
def test_a_port_that_is_taken_is_named(flag: str, model_repository_of_demo: Path) -> None:
    addresses = {"--listen": "127.0.0.1:0"}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        addresses[flag] = f"127.0.0.1:{taken.getsockname()[1]}"
        words = [word for pair in addresses.items() for word in pair]
        process = run("serve", "--model-repository", str(model_repository_of_demo), *words)
    assert process.returncode == 1
    assert said(process) == (
        f"error: cannot listen on {addresses[flag]}: something listens there already: end it, or "
        f"give another address with {flag}; port 0 is any free one"
    )


@pytest.fixture
def model_repository_of_demo(tmp_path: Path) -> Path:
    """Enough of a model repository for `serve` to go on to its addresses."""
    repository = tmp_path / "repository"
    for config in (ROOT / "model_repository").glob("*/config.pbtxt"):
        (repository / config.parent.name).mkdir(parents=True)
        shutil.copy(config, repository / config.parent.name)
    return repository


@pytest.mark.parametrize(
    ("listen", "way_out"),
    [
        ("203.0.113.1:9000", "this machine has no such address: --listen wants one of its own"),
        ("nowhere.invalid:9000", "the name is not known here: give an address of this machine"),
    ],
)
def test_an_address_of_elsewhere_cannot_be_listened_on(
    listen: str, way_out: str, model_repository_of_demo: Path
) -> None:
    repository = str(model_repository_of_demo)
    process = run("serve", "--model-repository", repository, "--listen", listen, "--insecure")
    assert process.returncode == 1
    assert f"cannot listen on {listen}: {way_out}" in said(process)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["export", "demo"], 3, "it has no config.json; a folder with config.json, weights and"),
        (["export", "no/such/folder"], 3, "'no/such/folder' is neither a local folder nor a hub"),
        (["serve"], 2, "there is no folder nowhere: `captionserve export CHECKPOINT --output"),
        (["serve", "demo/checkpoint"], 4, "this is a checkpoint: `captionserve export CHECKPOINT"),
        (["local"], 1, "a folder that `captionserve export` wrote is wanted"),
        (["local", "demo/checkpoint"], 1, "this is a checkpoint: `captionserve export CHECKPOINT"),
        (["demo", "docs"], 2, "there is no docs/checkpoint/config.json: give the demo folder of"),
        (["demo", "nowhere"], 2, "there is no nowhere/checkpoint/config.json: give the demo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_no_checkpoint_is_an_error_with_a_way_out(
    arguments: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    command, *given = arguments
    place = given[0] if given else "nowhere"
    process = {
        "export": lambda: run("export", place, "--output", str(tmp_path / "out")),
        "serve": lambda: run("serve", "--model-repository", place),
        "local": lambda: run("caption", IMAGE, "--local", place),
        "demo": lambda: run("demo", place),
    }[command]()
    assert process.returncode == code, process.stderr
    assert sentence in said(process)


def test_a_hub_id_without_a_network_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    name = "nlpconnect/vit-gpt2-image-captioning"
    process = run(
        *("export", name, "--output", str(tmp_path / "out")),
        HF_ENDPOINT="https://hub.invalid",
        HF_HOME=str(tmp_path / "home"),
        http_proxy="",
        https_proxy="",
        all_proxy="",
    )
    assert process.returncode == 3
    assert said(process) == (
        f"error: '{name}' is no local folder, and the Hugging Face hub cannot be reached: copy its "
        "files to this machine and give their folder, or try demo/checkpoint"
    )
    assert not (tmp_path / "out").exists()


@contextlib.contextmanager
def other_grpc_server() -> Iterator[str]:
    """Something that speaks gRPC and is no captionserve."""
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize("other", [web_server, other_grpc_server])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("caption", IMAGE, "--timeout", "5"), 5),
        (("caption", IMAGE, "--timeout", "5", "--stream"), 5),
        (("caption", IMAGE, "--timeout", "5", "--output", "captions.jsonl"), 5),
        (("health",), 1),
        (("evaluate",), 5),
        (("load", "--rates", "1", "--seconds", "1"), 5),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_is_no_captionserve_is_an_error_with_a_way_out(
    other: Callable[[], contextlib.AbstractContextManager[str]],
    command: tuple[str, ...],
    code: int,
    tmp_path: Path,
) -> None:
    command = tuple(str(tmp_path / word) if word.endswith(".jsonl") else word for word in command)
    with other() as target:
        process = run(*command, "--target", target)
    assert process.returncode == code
    assert said(process).partition(": ")[2] == (
        "NOT_CAPTIONSERVE: what answers at this address is no captionserve: the "
        "HOST:PORT that `captionserve serve --listen` was given is wanted"
    )


def test_nobody_at_an_address_is_an_error_with_a_way_out() -> None:
    process = run("caption", IMAGE, "--target", "127.0.0.1:1", "--timeout", "1")
    assert process.returncode == 5
    assert "nobody listens at this address: is the service started, and is this" in said(process)


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("captionserve ca", {"calibrate", "caption"}),
        ("captionserve export --pre", {"--precision"}),
        ("captionserve export --precision in", {"int8", "int4"}),
        ("captionserve caption --num-b", {"--num-beams", "--num-beam-groups"}),
        ("captionserve token cr", {"create"}),
    ],
)
def test_a_shell_completes_commands_options_and_their_values(
    line: str, completions: set[str]
) -> None:
    words = line.split()
    process = run(
        _CAPTIONSERVE_COMPLETE="complete_bash",
        COMP_WORDS=line,
        COMP_CWORD=str(len(words) - 1),
    )
    assert process.returncode == 0, process.stderr
    assert set(process.stdout.split()) == completions


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_too(shell: str) -> None:
    process = run(
        _CAPTIONSERVE_COMPLETE=f"complete_{shell}",
        _TYPER_COMPLETE_ARGS="captionserve ca",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    assert process.returncode == 0, process.stderr
    assert "calibrate" in process.stdout
    assert "caption" in process.stdout
    assert "export" not in process.stdout


def test_completion_is_installed_for_the_shell_of_who_asks(tmp_path: Path) -> None:
    (tmp_path / ".bashrc").touch()
    # The shell is the parent, which stays for what follows the command.
    process = subprocess.run(
        ["bash", "-c", f"'{COMMAND}' --install-completion; exit $?"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert process.returncode == 0, process.stdout
    assert "captionserve" in (tmp_path / ".bashrc").read_text()
    installed = tmp_path / ".bash_completions" / "captionserve.sh"
    assert "_CAPTIONSERVE_COMPLETE=complete_bash" in installed.read_text()


def test_the_doctor_says_that_this_machine_can_serve() -> None:
    process = run("doctor", "--json")
    assert process.returncode == 0, process.stdout
    report = json.loads(process.stdout)
    assert report["can_serve"] is True
    names = ["python", "packages", "cores", "processor", "memory", "shared memory", "triton"]
    assert [finding["name"] for finding in report["findings"]] == names
    for finding in report["findings"]:
        assert set(finding) == {"name", "found", "verdict", "advice"}


def test_the_doctor_says_what_is_missing_and_what_to_do() -> None:
    process = run("doctor", "--tritonserver", "/bin/true")
    assert process.returncode == 1
    lines = process.stdout.splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith("error"))
    assert re.fullmatch(r"error +triton +not found", lines[at])
    assert re.fullmatch(r" +-> .* has no Python backend beside it", lines[at + 1])
    assert lines[-2].startswith("to expect")
    assert lines[-1] == "captionserve cannot serve here"
