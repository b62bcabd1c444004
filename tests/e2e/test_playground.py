"""The playground's command in front of a real service, and of a model in its own process."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from captionserve import CaptionClient, GenerationOptions
from captionserve_server.gateway.tokens import create_token
from captionserve_server.local import LocalCaptioner
from captionserve_server.playground.app import files
from captionserve_server.serving.ready import ReadyReport

from tests.certificates import CertificateFiles
from tests.conftest import DEMO, DEMO_FOLDER, Repositories
from tests.faults.served import serving

CAPTIONS: dict[str, str] = json.loads((DEMO_FOLDER / "images" / "captions.json").read_text())
HEADERS = {"Content-Type": "application/octet-stream"}
WAIT_SECONDS = 60.0


@contextmanager
def playground(*arguments: str) -> Iterator[tuple[httpx.Client, list[str]]]:
    """The command; a visitor of its page, and what it has said until it answers."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "captionserve_server.cli.main", "playground"),
            *("--listen", "127.0.0.1:0", *arguments),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said: list[str] = []
        while not (said and (found := re.search(r"http://\S+", said[-1]))):
            said.append(process.stdout.readline())
            assert said[-1], said
        with httpx.Client(base_url=found.group(), timeout=WAIT_SECONDS) as visitor:
            yield visitor, said
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, rest) == (0, "")


def ask(visitor: httpx.Client, image: bytes, **asked: Any) -> list[dict[str, Any]]:
    content = json.dumps({"options": {}, **asked}).encode() + b"\n" + image
    response = visitor.post("/api/caption", content=content, headers=HEADERS)
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_samples_are_captioned_as_the_demos_images_are(
    service: Callable[[str], ReadyReport],
) -> None:
    with playground("--target", service(DEMO).grpc) as (visitor, _):
        paths = visitor.get("/samples/index.json").json()
        expected = {Path(name).stem: caption for name, caption in CAPTIONS.items()}
        assert {Path(path).stem for path in paths} == set(expected)
        for path in paths:
            events = ask(visitor, visitor.get(path).content)
            caption = events[-1]["result"]["captions"][0]["text"]
            assert caption == expected[Path(path).stem]
            assert "".join(event.get("text", "") for event in events) == caption


def test_a_visitor_gets_what_a_client_gets(
    service: Callable[[str], ReadyReport], model_repository: Repositories
) -> None:
    image = (DEMO_FOLDER / "images" / "book.webp").read_bytes()
    options = {"num_beams": 3, "num_return_sequences": 2, "output_beams": True}
    box = (10, 20, 300, 400)
    with CaptionClient(service(DEMO).grpc) as client:
        expected = client.caption(image, GenerationOptions(**options), regions=[box])  # type: ignore[arg-type]
    assert expected.beams is not None
    for arguments in (
        ("--target", service(DEMO).grpc),
        ("--local", str(model_repository(DEMO))),
    ):
        with playground(*arguments) as (visitor, _):
            shown = ask(visitor, image, options={**options, "output_stages": True}, regions=[box])
            facts = visitor.get("/api/model").json()
        *updates, last = shown
        result = last["result"]
        # Words and steps come before the result, both ways; the steps one by one.
        assert "".join(each["text"] for each in updates) == expected.text
        told = [step for each in updates for step in each["beam_steps"]]
        assert told == result["beams"]["steps"]
        assert max(len(each["beam_steps"]) for each in updates) == 1
        assert [each["text"] for each in result["captions"]] == [
            each.text for each in expected.captions
        ]
        assert [each["captions"][0]["text"] for each in result["regions"]] == [
            each.text for each in expected.regions
        ]
        assert [
            [(each["parent"], each["token_id"], each["fate"], each["beam"]) for each in step]
            for step in result["beams"]["steps"]
        ] == [
            [(each.parent, each.token_id, each.fate.value, each.beam) for each in step]
            for step in expected.beams.steps
        ]
        assert len(result["beams"]["paths"]) == 2
        stages = {each["name"]: each["milliseconds"] for each in result["stages"]}
        assert stages["encode"] > 0
        assert stages["steps"] > 0
        assert facts["where"] == arguments[1]
        assert facts["models"][0]["precision"] == "fp32"


def test_stages_and_histories_of_both_ways_agree_with_a_plain_call(
    service: Callable[[str], ReadyReport], model_repository: Repositories
) -> None:
    image = DEMO_FOLDER / "images" / "penguin.jpg"
    asked = GenerationOptions(num_beams=4, output_beams=True, output_stages=True)
    with CaptionClient(service(DEMO).grpc) as client:
        *_, last = client.caption_stream(image, asked)
        plain = client.caption(image, asked, bypass_cache=True)
        again = client.caption(image, asked)
    with LocalCaptioner(model_repository(DEMO), threads=1) as captioner:
        local = captioner.caption(image, num_beams=4, output_beams=True, output_stages=True)
    assert last.result is not None
    assert last.result.beams == plain.beams == again.beams
    assert plain.beams is not None
    assert local.beams is not None
    assert [
        [(each.parent, each.token_id, each.fate, each.beam) for each in step]
        for step in local.beams.steps
    ] == [
        [(each.parent, each.token_id, each.fate.value, each.beam) for each in step]
        for step in plain.beams.steps
    ]
    assert [stage.name for stage in plain.stages] == ["turn", *(s.name for s in local.stages)]
    assert (again.cached, again.stages) == (True, ())
    assert sum(stage.milliseconds for stage in local.stages) > 1


def test_the_token_stays_with_the_command(model_repository: Repositories, tmp_path: Path) -> None:
    own = CertificateFiles(tmp_path)
    token = create_token(own.tokens, "visitors")
    (tmp_path / "token").write_text(token + "\n")
    with serving(
        *(model_repository(DEMO), tmp_path, "--tls-certificate", str(own.certificate)),
        *("--tls-key", str(own.key), "--tokens", str(own.tokens)),
    ) as served:
        image = (DEMO_FOLDER / "images" / "crown.png").read_bytes()
        tls = ("--target", served.report["grpc"], "--tls-ca", str(own.ca))
        with playground(*tls) as (visitor, _):
            assert ask(visitor, image)[-1]["error"]["reason"] == "UNAUTHENTICATED"
        with playground(*tls, "--token-file", str(tmp_path / "token")) as (visitor, _):
            events = ask(visitor, image)
            assert events[-1]["result"]["captions"][0]["text"] == CAPTIONS["crown.png"]
            told = visitor.get("/api/model").text + json.dumps(events)
            assert token not in told


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--listen", "nowhere"), 2, "HOST:PORT"),
        (("--target", "10.0.0.1:9000", "--token-file", __file__), 2, "token"),
        (("--local", "/nowhere"), 1, "/nowhere"),
        (("--local", "/nowhere", "--target", "127.0.0.1:9000"), 2, "--local"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: tuple[str, ...], code: int, said: str) -> None:
    process = subprocess.run(
        [
            *(sys.executable, "-m", "captionserve_server.cli.main", "playground"),
            *("--listen", "127.0.0.1:0", *arguments),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_SECONDS,
    )
    assert process.returncode == code, process.stderr
    assert said in process.stderr
    assert "Traceback" not in process.stderr


def test_one_sentence_says_why_nobody_can_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = subprocess.run(
            [
                *(sys.executable, "-m", "captionserve_server.cli.main", "playground"),
                *("--listen", f"127.0.0.1:{port}"),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_SECONDS,
        )
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in process.stderr
    assert "--listen" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_service_that_is_not_there_is_said_on_the_page() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        target = f"127.0.0.1:{nobody.getsockname()[1]}"
    with playground("--target", target, "--timeout", "1") as (visitor, _):
        assert visitor.get("/").status_code == 200
        error = visitor.get("/api/model").json()["error"]
        assert error["message"]
        events = ask(visitor, b"any")
        assert events[-1]["error"]["reason"]


def test_files_are_the_same_as_in_the_package(service: Callable[[str], ReadyReport]) -> None:
    with playground("--target", service(DEMO).grpc) as (visitor, said):
        for path, (content, _) in files().items():
            assert visitor.get(path).content == content
        # Loopback needs no warning.
        assert len(said) == 1
