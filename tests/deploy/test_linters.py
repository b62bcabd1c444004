"""What others' linters find in image definitions, scripts and YAML, and that they find anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.tools import ROOT, run, said

DOCKER = ROOT / "docker"
YAMLLINT = ("--strict", "--config-file", DOCKER / ".yamllint.yaml")


def dockerfiles() -> list[Path]:
    return sorted(DOCKER.glob("Dockerfile*"))


def scripts() -> list[Path]:
    """Shell scripts by their first line, wherever people would look for them."""
    places = [*DOCKER.rglob("*"), *(ROOT / ".ci").iterdir()]
    return sorted(path for path in places if path.is_file() and _is_shell(path))


def _is_shell(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(64)
    return first.startswith(b"#!") and b"sh" in first.split(b"/")[-1]


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    ended = run("hadolint", path)
    assert ended.returncode == 0, said(ended)


def test_hadolint_finds_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text("FROM debian\nRUN cd /opt\n")
    ended = run("hadolint", path)
    assert ended.returncode != 0
    assert "DL3006" in ended.stdout  # No tag.


def test_scripts_are_found() -> None:
    assert ROOT / ".ci" / "run" in scripts()


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    ended = run("shellcheck", path)
    assert ended.returncode == 0, said(ended)


def test_shellcheck_finds_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text("#!/bin/sh\nrm -r $1\n")
    ended = run("shellcheck", path)
    assert ended.returncode != 0
    assert "SC2086" in ended.stdout  # Not quoted.


def test_yamllint_finds_nothing() -> None:
    ended = run("yamllint", *YAMLLINT, DOCKER)
    assert ended.returncode == 0, said(ended)


def test_yamllint_finds_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("port: 9000\nport: 9001\n")
    ended = run("yamllint", *YAMLLINT, path)
    assert ended.returncode != 0
    assert "duplication of key" in ended.stdout
