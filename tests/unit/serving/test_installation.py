"""The backend folder that Triton serves from."""

from __future__ import annotations

from pathlib import Path

import pytest
from captionserve_server.serving.installation import TritonInstallation, assemble_backends

LIBRARIES = {"onnxruntime": "libtriton_onnxruntime.so", "pytorch": "libtriton_pytorch.so"}


@pytest.fixture
def installation(tmp_path: Path) -> TritonInstallation:
    """One with the Python backend alone."""
    root = tmp_path / "installed"
    (root / "backends" / "python").mkdir(parents=True)
    (root / "backends" / "python" / "libtriton_python.so").touch()
    stub = root / "triton_python_backend_stub"
    stub.touch()
    return TritonInstallation(
        binary=root / "bin" / "tritonserver",
        backends=root / "backends",
        python_stub=stub,
        library_folders=(),
    )


def assembled(installation: TritonInstallation, tmp_path: Path) -> Path:
    folder = tmp_path / "assembled"
    folder.mkdir()
    assemble_backends(installation, folder)
    return folder


def test_backends_for_graphs_are_ours_where_triton_has_none(
    installation: TritonInstallation, tmp_path: Path
) -> None:
    folder = assembled(installation, tmp_path)
    for name in LIBRARIES:
        assert "graph_backend import TritonPythonModel" in (folder / name / "model.py").read_text()
    assert {path.name for path in (folder / "python").iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_stub",
    }


@pytest.mark.parametrize("name", LIBRARIES)
def test_tritons_own_backend_is_taken_where_it_is_installed(
    name: str, installation: TritonInstallation, tmp_path: Path
) -> None:
    (installation.backends / name).mkdir()
    (installation.backends / name / LIBRARIES[name]).touch()
    folder = assembled(installation, tmp_path)
    assert (folder / name).resolve() == installation.backends / name
    (other,) = set(LIBRARIES) - {name}
    assert (folder / other / "model.py").is_file()


def test_a_backend_folder_without_its_library_is_not_taken(
    installation: TritonInstallation, tmp_path: Path
) -> None:
    (installation.backends / "pytorch").mkdir()
    folder = assembled(installation, tmp_path)
    assert not (folder / "pytorch").is_symlink()
    assert list((installation.backends / "pytorch").iterdir()) == []
