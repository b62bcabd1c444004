"""Finding a tritonserver and laying out the backend folder that it serves from.

Three kinds of installation are understood:

- the `nvidia-pytriton` wheel, which carries tritonserver, the Python backend and a stub for each
  Python version, but no backend that runs graphs;
- NVIDIA's container or any installation with `backends` beside `bin`, such as /opt/tritonserver;
- a lone tritonserver binary, whose `backends` folder is looked for beside it.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from captionserve_server.runtime.graph_format import GraphFormat

_STUB = "triton_python_backend_stub"
# Triton's own backends for graphs, and the library of each.
_GRAPH_BACKENDS = {
    GraphFormat.ONNX.backend: "libtriton_onnxruntime.so",
    GraphFormat.TORCHSCRIPT.backend: "libtriton_pytorch.so",
}
_DEFAULT_ROOT = Path("/opt/tritonserver")


class TritonNotFoundError(RuntimeError):
    """No usable tritonserver; the message says what was looked for."""


@dataclass(frozen=True)
class TritonInstallation:
    """A tritonserver and what it needs around it.

    Attributes:
        binary: the tritonserver executable.
        backends: folder that holds a folder per backend.
        python_stub: Python backend stub for the running Python version.
        library_folders: folders for LD_LIBRARY_PATH, in order.
    """

    binary: Path
    backends: Path
    python_stub: Path
    library_folders: tuple[Path, ...]


def find_triton(binary: Path | None = None) -> TritonInstallation:
    """Find the tritonserver to run.

    Args:
        binary: a tritonserver executable; when None, the one on PATH or in its usual place is
            taken, then that of the nvidia-pytriton wheel.

    Raises:
        TritonNotFoundError: if there is none, or its Python backend lacks a stub for this Python.
    """
    if binary is not None:
        return _installed(binary)
    on_path = shutil.which("tritonserver")
    for candidate in (on_path, _DEFAULT_ROOT / "bin" / "tritonserver"):
        if candidate and Path(candidate).is_file():
            return _installed(Path(candidate))
    return _embedded()


def _installed(binary: Path) -> TritonInstallation:
    if not binary.is_file():
        raise TritonNotFoundError(f"{binary} is not a file")
    binary = binary.resolve()
    if (binary.parent.parent / "python_backend_stubs").is_dir():
        return _embedded()
    backends = binary.parent.parent / "backends"
    stub = backends / "python" / _STUB
    if not stub.is_file():
        raise TritonNotFoundError(f"{binary} has no Python backend beside it")
    root = binary.parent.parent
    return TritonInstallation(binary, backends, stub, (root / "lib",))


def _embedded() -> TritonInstallation:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise TritonNotFoundError(
            "no tritonserver found; "
            "install captionserve-server[embedded] or give --tritonserver PATH"
        )
    package = Path(spec.submodule_search_locations[0])
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / _STUB
    if not stub.is_file():
        raise TritonNotFoundError(f"the nvidia-pytriton wheel has no stub for Python {version}")
    return TritonInstallation(
        binary=root / "bin" / "tritonserver",
        backends=root / "backends",
        python_stub=stub,
        library_folders=(package.parent / "nvidia_pytriton.libs", *_python_library_folders()),
    )


def _python_library_folders() -> tuple[Path, ...]:
    """Where libpython lies, which the stub links to."""
    folder = sysconfig.get_config_var("LIBDIR")
    return (Path(folder),) if folder else ()


def assemble_backends(installation: TritonInstallation, folder: Path) -> None:
    """Lay a backend folder out from the installation's files.

    Args:
        installation: where backends and stub come from.
        folder: an empty folder to fill.
    """
    missing = [
        name
        for name, library in _GRAPH_BACKENDS.items()
        if not (installation.backends / name / library).exists()
    ]
    for backend in installation.backends.iterdir():
        if backend.name not in {"python", *missing} and backend.is_dir():
            (folder / backend.name).symlink_to(backend)
    # Copies: Triton refuses a backend library whose real path is outside of the backend folder.
    python = folder / "python"
    shutil.copytree(installation.backends / "python", python)
    shutil.copy(installation.python_stub, python / _STUB)
    for name in missing:
        _add_graph_backend(folder / name)


def _add_graph_backend(folder: Path) -> None:
    """The python-based backend in the place of Triton's own."""
    folder.mkdir()
    (folder / "model.py").write_text(
        "from captionserve_server.triton.graph_backend import TritonPythonModel\n"
    )
