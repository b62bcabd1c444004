"""A folder that cannot be filled leaves nothing behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from captionserve_server.serving.installation import TritonInstallation
from captionserve_server.serving.triton_process import TritonProcess


@pytest.mark.parametrize("lacking", ["program", "backends", "repository"])
def test_a_process_that_does_not_start_leaves_no_folder(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("temporary", "backends", "repository")]
    for folder in folders:
        folder.mkdir()
    temporary, backends, repository = folders
    (backends / "python").mkdir()
    stub = tmp_path / "stub"
    stub.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    if lacking != "program":
        (tmp_path / lacking).rename(tmp_path / "elsewhere")
    installation = TritonInstallation(
        binary=tmp_path / "no such program",
        backends=backends,
        python_stub=stub,
        library_folders=(),
    )
    with pytest.raises(FileNotFoundError):
        TritonProcess(installation, repository)
    assert not list(temporary.iterdir())
