"""Finding a tritonserver and laying out the backend folder that it serves from.

Three kinds of installation are understood:

- the `nvidia-pytriton` wheel, which carries tritonserver, the Python backend and a stub for each
  Python version, but no ONNX Runtime backend;
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

_STUB = "triton_python_backend_stub"
_ONNX_RUNTIME_LIBRARY = "libtriton_onnxruntime.so"
_DEFAULT_ROOT = Path("/opt/tritonserver")


class TritonNotFoundError(RuntimeError):
    """No usable tritonserver; the message says what was looked for."""


@dataclass(frozen=True)
class TritonInstallation:
    """A tritonserver and what it needs around it.

    Attributes:
        binary: the tritonserver executable.
        backends: folder that holds a folder per backend.
        caches: folder that holds a folder per kind of response cache.
        python_stub: Python backend stub for the running Python version.
        library_folders: folders for LD_LIBRARY_PATH, in order.
    """

    binary: Path
    backends: Path
    caches: Path
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
    return TritonInstallation(binary, backends, root / "caches", stub, (root / "lib",))


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
        caches=root / "caches",
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
    for backend in installation.backends.iterdir():
        if backend.name != "python" and backend.is_dir():
            (folder / backend.name).symlink_to(backend)
    # Copies: Triton refuses a backend library whose real path is outside of the backend folder.
    python = folder / "python"
    shutil.copytree(installation.backends / "python", python)
    shutil.copy(installation.python_stub, python / _STUB)
    if not (installation.backends / "onnxruntime" / _ONNX_RUNTIME_LIBRARY).exists():
        _add_onnxruntime_backend(folder / "onnxruntime")


def _add_onnxruntime_backend(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.py").write_text(
        "from captionserve_server.triton.onnxruntime_backend import TritonPythonModel\n"
    )
