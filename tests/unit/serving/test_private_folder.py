"""The folder that Triton is given, and the copy of a model repository in it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from captionserve_server.serving import private_folder
from captionserve_server.serving.installation import TritonInstallation
from captionserve_server.serving.private_folder import (
    NoPlainFolderError,
    PrivateFolder,
    copy_repository,
    make_plain_folder,
)


def test_configuration_and_code_are_copied_and_the_rest_is_linked(tmp_path: Path) -> None:
    version = tmp_path / "repository" / "decoder" / "1"
    version.mkdir(parents=True)
    files = {"config.pbtxt": version.parent, "model.py": version, "step.onnx": version}
    for name, folder in files.items():
        (folder / name).write_text(name)
    (version / "__pycache__").mkdir()
    (tmp_path / "repository" / ".export-1").mkdir()

    copy = tmp_path / "copy"
    copy_repository(tmp_path / "repository", copy)

    copied = {path.name: path for path in copy.rglob("*") if path.is_file()}
    assert {name: path.read_text() for name, path in copied.items()} == {n: n for n in files}
    assert {name for name, path in copied.items() if path.is_symlink()} == {"step.onnx"}
    assert {path.name for path in copy.rglob("*") if path.is_dir()} == {"decoder", "1"}


def test_links_of_a_relative_repository_lead_to_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "step.onnx").write_text("graph")
    monkeypatch.chdir(tmp_path)
    copy_repository(Path("repository"), tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "step.onnx").read_text() == "graph"


@pytest.mark.parametrize("name", ["a b", "it's", 'a"b', "a;b", "$(a)", "é", "a\nb", "plain\n"])
def test_a_temporary_folder_with_another_name_is_not_taken(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = tmp_path / "usual"
    for folder in (tmp_path / name, usual):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    monkeypatch.setattr(private_folder, "_USUAL_FOLDERS", (str(tmp_path / "none"), str(usual)))
    assert make_plain_folder().parent == usual


def test_no_place_at_all_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a b"))
    monkeypatch.setattr(private_folder, "_USUAL_FOLDERS", (str(tmp_path / "none"),))
    with pytest.raises(NoPlainFolderError, match="TMPDIR"):
        make_plain_folder()


@pytest.fixture
def installation(tmp_path: Path) -> TritonInstallation:
    """One with the Python backend alone, whose program is never run."""
    (tmp_path / "backends" / "python").mkdir(parents=True)
    (tmp_path / "stub").touch()
    return TritonInstallation(
        binary=tmp_path / "tritonserver",
        backends=tmp_path / "backends",
        python_stub=tmp_path / "stub",
        library_folders=(),
    )


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Where temporary folders and shared memory lie for a test."""
    temporary, shared = tmp_path / "temporary", tmp_path / "shm"
    temporary.mkdir()
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(private_folder, "_SHARED_MEMORY", shared)
    monkeypatch.setattr(private_folder, "_USUAL_FOLDERS", ())
    return temporary, shared


@pytest.mark.parametrize("lacking", ["backends", "repository"])
def test_what_cannot_be_filled_leaves_nothing(
    lacking: str, installation: TritonInstallation, places: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / lacking).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        PrivateFolder(installation, tmp_path / "repository")
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_what_a_killed_service_has_left_is_removed_and_a_living_ones_is_not(
    installation: TritonInstallation, places: tuple[Path, Path], tmp_path: Path
) -> None:
    temporary, shared = places
    (tmp_path / "repository").mkdir()
    living = PrivateFolder(installation, tmp_path / "repository")
    dead = PrivateFolder(installation, tmp_path / "repository")
    for folder in (living, dead):
        (shared / f"{folder.shared_memory_prefix}_region").touch()
    # As the kernel does when a process ends: its locks are gone, its files are not.
    os.close(dead._lock)

    third = PrivateFolder(installation, tmp_path / "repository")

    left = {living.shared_memory_prefix, third.shared_memory_prefix}
    assert {path.name for path in temporary.iterdir()} == left
    assert {path.name for path in shared.iterdir()} == {
        f"{living.shared_memory_prefix}_region",
        *(f"{name}.lock" for name in left),
    }
    for folder in (living, third):
        folder.close()
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_a_triton_that_has_ended_leaves_the_files_for_the_next(
    installation: TritonInstallation, places: tuple[Path, Path], tmp_path: Path
) -> None:
    _, shared = places
    (tmp_path / "repository" / "decoder" / "12").mkdir(parents=True)
    with contextlib.closing(PrivateFolder(installation, tmp_path / "repository")) as folder:
        (shared / f"{folder.shared_memory_prefix}_region").touch()
        (folder.heartbeats / "17").touch()
        folder.tidy()
        assert [path.suffix for path in shared.iterdir()] == [".lock"]
        assert list(folder.heartbeats.iterdir()) == []
        assert folder.versions == [12]
        assert (folder.backends / "python").is_dir()
