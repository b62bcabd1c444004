"""`captionserve caption --local`, and the command where only the edge mode is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from captionserve_server.cli import entry
from captionserve_server.cli.console import ExitCode
from captionserve_server.cli.main import main
from captionserve_server.local import LocalCaptioner

from tests.reference import picture

NAME = "projected"


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    exit_code: str | int | None
    stdout: str
    stderr: str


Caption = Callable[..., Ended]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def caption(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Caption:
    """`captionserve caption` with the arguments that it is called with."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["captionserve", "caption", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def folder(model_repository: Callable[[str], Path]) -> str:
    return str(model_repository(NAME))


def test_captions_are_printed_with_their_scores(
    caption: Caption, images: list[str], folder: str
) -> None:
    ended = caption(*images, "--local", folder, "--num-beams", "3", "--num-return-sequences", "2")
    assert ended.exit_code == ExitCode.OK
    with LocalCaptioner(folder, threads=1) as captioner:
        results = captioner.caption_all(images, num_beams=3, num_return_sequences=2)
    assert ended.stdout.splitlines() == [
        f"{image}: {found.text} ({found.score:.3f})"
        for image, result in zip(images, results, strict=True)
        for found in result.captions
    ]


def test_json_holds_the_whole_result(caption: Caption, images: list[str], folder: str) -> None:
    ended = caption(images[0], "--local", folder, "--max-length", "9", "--attention", "--json")
    (answer,) = json.loads(ended.stdout)
    (found,) = answer["captions"]
    with LocalCaptioner(folder, threads=1) as captioner:
        result = captioner.caption(images[0], max_length=9, output_attentions=True)
    (expected,) = result.captions
    assert expected.attention is not None
    assert (answer["image"], answer["cached"]) == (images[0], False)
    assert found["text"] == expected.text
    assert found["token_ids"] == list(expected.token_ids)
    assert found["finish_reason"] == expected.finish_reason
    grids = [[pytest.approx(row, abs=1e-5) for row in grid] for grid in expected.attention.tolist()]
    assert found["attention"] == grids


def test_one_bad_image_does_not_end_the_others(
    caption: Caption, images: list[str], folder: str, tmp_path: Path
) -> None:
    bad, missing = tmp_path / "bad.jpg", tmp_path / "missing.jpg"
    bad.write_text("no image")
    ended = caption(images[0], str(bad), str(missing), images[1], "--local", folder, "--json")
    assert ended.exit_code == ExitCode.CALL_FAILED
    first, refused, unread, last = json.loads(ended.stdout)
    assert first["captions"]
    assert last["captions"]
    assert refused["error"]["code"] == "INVALID_ARGUMENT"
    assert refused["error"]["reason"] == "UNSUPPORTED_IMAGE_FORMAT"
    assert unread["error"]["reason"] == "UNREADABLE"


def test_wrong_options_are_each_images_error(
    caption: Caption, images: list[str], folder: str
) -> None:
    ended = caption(*images[:2], "--local", folder, "--num-beams", "99", "--json")
    assert ended.exit_code == ExitCode.CALL_FAILED
    answers = json.loads(ended.stdout)
    assert [answer["image"] for answer in answers] == images[:2]
    assert [answer["error"]["reason"] for answer in answers] == ["INVALID_OPTIONS"] * 2


def test_words_are_printed_as_they_become_certain(
    caption: Caption, images: list[str], folder: str, tmp_path: Path
) -> None:
    bad, missing = tmp_path / "bad.jpg", tmp_path / "missing.jpg"
    bad.write_text("no image")
    mixed = [images[0], str(bad), str(missing), images[1]]
    ended = caption(*mixed, "--local", folder, "--stream")
    assert ended.exit_code == ExitCode.CALL_FAILED
    with LocalCaptioner(folder, threads=1) as captioner:
        texts = [result.text for result in captioner.caption_all(images[:2])]
    assert ended.stdout.splitlines() == [
        f"{image}: {text}" for image, text in zip(images, texts, strict=False)
    ]
    refused, unread = ended.stderr.splitlines()
    assert refused.startswith(f"{bad}: UNSUPPORTED_IMAGE_FORMAT: ")
    assert unread.startswith(f"{missing}: UNREADABLE: ")


@pytest.mark.parametrize(
    "needs_a_service",
    [("--target", "127.0.0.1:1"), ("--timeout", "3"), ("--bypass-cache",)],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_a_service_is_refused(
    needs_a_service: tuple[str, ...], caption: Caption, images: list[str], folder: str
) -> None:
    ended = caption(images[0], "--local", folder, *needs_a_service)
    assert ended.exit_code == ExitCode.USAGE
    assert needs_a_service[0] in ended.stderr
    assert "cannot be combined with --local" in ended.stderr


def test_a_target_in_the_environment_is_for_other_calls(
    caption: Caption, images: list[str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPTIONSERVE_TARGET", "127.0.0.1:1")
    assert caption(images[0], "--local", folder).exit_code == ExitCode.OK


def test_a_folder_that_is_no_repository_is_an_error_in_words(
    caption: Caption, images: list[str], tmp_path: Path
) -> None:
    ended = caption(images[0], "--local", str(tmp_path))
    assert ended.exit_code == ExitCode.FAILED
    assert f"error: {tmp_path}: this is no model repository" in ended.stderr


def test_without_its_packages_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "captionserve_server.cli.main")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"typer is missing.*captionserve-server\[service\]"):
        entry.main()
