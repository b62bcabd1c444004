"""What images are made from, held to what says it: locks to pyproject.toml, the Dockerfile to both.

Each check finds what is wrong in a text, and has a text with that mistake to prove it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from captionserve_server.cli.settings_options import variable
from captionserve_server.settings import Settings
from packaging.requirements import Requirement

from docker.lock import IMAGES, PYTHON_VERSION, wanted
from docker.release_check import refusals
from tests.deploy.locks import BASE, lock_text, versions_in
from tests.deploy.places import ROOT

LOCKS = (*IMAGES, "build", "tools")
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()


def drift(image: str, text: str) -> list[str]:
    """The needs of an image that its lock does not meet."""
    locked = versions_in(text)
    return [
        str(each)
        for each in wanted(IMAGES[image])
        if each.name not in locked or not each.specifier.contains(locked[each.name])
    ]


def other_versions(text: str) -> list[str]:
    """Packages that the tests run with in another version than the lock names."""
    locked = versions_in(text)
    constraints = [Requirement(line) for line in CONSTRAINTS.splitlines() if line[:1].isalpha()]
    return [
        str(each)
        for each in constraints
        if each.name in locked and not each.specifier.contains(locked[each.name])
    ]


def without_hash(text: str) -> list[str]:
    """Packages of a lock whose files are not told apart."""
    entries = re.findall(r"^(\S+==\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", text, re.M)
    assert len(entries) == text.count("==")
    return [name for name, hashes in entries if not hashes]


@pytest.mark.parametrize("image", IMAGES)
def test_a_lock_has_all_that_its_image_needs(image: str) -> None:
    assert drift(image, lock_text(image)) == []


@pytest.mark.parametrize(
    ("there", "instead"),
    [("\nnumpy==", "\nnumpi=="), ("\nnumpy==1.26", "\nnumpy==1.25")],
    ids=["missing", "too old"],
)
def test_a_lock_that_lacks_something_is_found(there: str, instead: str) -> None:
    text = lock_text("server")
    assert there in text
    assert drift("server", text.replace(there, instead)) == ["numpy>=1.26"]


def test_the_server_image_has_triton_and_the_edge_image_has_not() -> None:
    assert "nvidia-pytriton" in versions_in(lock_text("server"))
    assert "nvidia-pytriton" not in versions_in(lock_text("edge"))


@pytest.mark.parametrize("image", IMAGES)
def test_no_image_brings_what_only_export_needs(image: str) -> None:
    unwanted = {"torch", "transformers", "onnx", "onnxscript", "pip", "setuptools"}
    assert versions_in(lock_text(image)).keys().isdisjoint(unwanted)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_the_versions_that_the_tests_run_with(image: str) -> None:
    assert other_versions(lock_text(image)) == []


def test_another_version_than_the_tests_is_found() -> None:
    text = re.sub(r"^grpcio==\S+", "grpcio==1.81.0", lock_text("server"), flags=re.M)
    assert [each.partition("=")[0] for each in other_versions(text)] == ["grpcio"]


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_every_file_by_its_hash_and_no_index(name: str) -> None:
    text = lock_text(name)
    assert without_hash(text) == []
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


def test_a_package_without_hashes_is_found() -> None:
    text = lock_text("build")
    first = re.search(r"^(\S+==\S+) \\\n(    --hash=\S+(?: \\)?\n)+", text, re.M)
    assert first is not None
    assert without_hash(text.replace(first[0], f"{first[1]}\n")) == [first[1]]


def unknown_variables(dockerfile: str) -> set[str]:
    """Variables of ours that an image sets, and the service does not know."""
    known = {variable(name) for name in Settings.model_fields}
    return set(re.findall(r"\bCAPTIONSERVE_[A-Z_]+", dockerfile)) - known


def unexposed_ports(dockerfile: str) -> set[str]:
    """Ports that are listened on and not exposed, or the other way round."""
    (exposed,) = re.findall(r"^EXPOSE (.*)$", dockerfile, re.M)
    return set(re.findall(r"LISTEN=\S+:(\d+)", dockerfile)) ^ set(exposed.split())


def shell_forms(dockerfile: str) -> list[str]:
    """Instructions through a shell, which would be the first process and pass no signal on."""
    found = re.findall(r"^.*\b(?:ENTRYPOINT|CMD) .*$", dockerfile, re.M)
    assert len(found) == 4
    return [line for line in found if not line.endswith('"]')]


def test_the_dockerfile_fits_the_service() -> None:
    assert unknown_variables(DOCKERFILE) == set()
    assert unexposed_ports(DOCKERFILE) == set()
    assert shell_forms(DOCKERFILE) == []
    assert "# syntax=" not in DOCKERFILE.splitlines()[0]
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M) == ["10001:10001"]
    assert re.findall(r"^STOPSIGNAL (.*)$", DOCKERFILE, re.M) == ["SIGTERM"]


@pytest.mark.parametrize(
    ("check", "there", "instead"),
    [
        (unknown_variables, "CAPTIONSERVE_LISTEN", "CAPTIONSERVE_LISTENS"),
        (unexposed_ports, "EXPOSE 9000 9001", "EXPOSE 9001"),
        (shell_forms, 'CMD ["serve"]', "CMD serve"),
    ],
)
def test_a_mistake_in_the_dockerfile_is_found(check: object, there: str, instead: str) -> None:
    assert callable(check)
    assert there in DOCKERFILE
    assert check(DOCKERFILE.replace(there, instead))


def test_the_base_is_the_one_that_the_dockerfile_falls_back_to() -> None:
    assert BASE.partition("@")[0] in re.findall(r"^ARG BASE=(.*)$", DOCKERFILE, re.M)
    assert f"python:{PYTHON_VERSION}-" in BASE


DIGEST = "0123456789abcdef" * 4
RELEASE = {
    "docker/base.lock": f"BASE=docker.io/library/python:3.11@sha256:{DIGEST}\n",
    "client/pyproject.toml": 'version = "1.2.0"\n',
    "server_tools/pyproject.toml": 'version = "1.2.0"\n',
    "CHANGELOG.md": "# Changes\n\n## 1.2.0\n",
}


def released(folder: Path, changed: dict[str, str]) -> list[str]:
    """The refusals of a release of these files."""
    for name, text in {**RELEASE, **changed}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return refusals(folder)


def test_a_release_with_all_digests_is_allowed(tmp_path: Path) -> None:
    assert released(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("docker/base.lock", "BASE=docker.io/library/python:3.11\n", "make pin-base"),
        ("docker/base.lock", "BASE=python:3.11@sha256:0123\n", "make pin-base"),
        ("client/pyproject.toml", 'version = "1.1.0"\n', "1.1.0"),
        ("CHANGELOG.md", "# Changes\n\n## 1.1.0\n", "CHANGELOG.md"),
        ("CHANGELOG.md", "# Changes\n\n## 1.2.0 (unreleased)\n", "CHANGELOG.md"),
    ],
)
def test_a_release_that_lacks_something_is_refused(
    name: str, text: str, said: str, tmp_path: Path
) -> None:
    (refusal,) = released(tmp_path, {name: text})
    assert said in refusal
