"""The folder that Triton is given, and the copy of a model repository in it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from captionserve_server.serving import private_folder
from captionserve_server.serving.private_folder import (
    NoPlainFolderError,
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
