"""Finding NVIDIA's perf_analyzer, or fetching it from a wheel of tritonclient.

The last wheels of tritonclient that carry the program and run with glibc 2.34 are those of 2.50. It
wants two libraries that few machines have; the nvidia-pytriton wheel has them, under names of its
own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

_WHEEL = "tritonclient==2.50.0"
_PROGRAM = "perf_analyzer"
_PROGRAM_IN_WHEEL = f"tritonclient-2.50.0.data/data/bin/{_PROGRAM}"
# What the program asks for, and how the nvidia-pytriton wheel names it.
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}


class PerfAnalyzerNotFoundError(RuntimeError):
    """No perf_analyzer that runs here; the message says why."""


@dataclass(frozen=True)
class PerfAnalyzer:
    """A perf_analyzer that runs here.

    Attributes:
        binary: the executable.
        libraries: a folder for LD_LIBRARY_PATH; None where it needs none.
    """

    binary: Path
    libraries: Path | None = None

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with what the program needs to start."""
        if self.libraries is None:
            return dict(os.environ)
        folders = (str(self.libraries), os.environ.get("LD_LIBRARY_PATH", ""))
        return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders))}


def find_perf_analyzer(folder: Path) -> PerfAnalyzer:
    """The perf_analyzer on PATH, else one fetched into `folder`, where it stays for the next time.

    Raises:
        PerfAnalyzerNotFoundError: if there is none, or it does not run.
    """
    on_path = shutil.which(_PROGRAM)
    found = PerfAnalyzer(Path(on_path)) if on_path else _fetched(folder)
    _check(found)
    return found


def _fetched(folder: Path) -> PerfAnalyzer:
    folder.mkdir(parents=True, exist_ok=True)
    binary = folder / _PROGRAM
    if not binary.exists():
        _unpack(_download(folder), binary)
    libraries = folder / "lib"
    _link_libraries(_wheel_libraries(), libraries)
    return PerfAnalyzer(binary, libraries)


def _download(folder: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary", ":all:", "--dest", str(folder), _WHEEL),
    ]
    run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if run.returncode:
        raise PerfAnalyzerNotFoundError(f"pip cannot download {_WHEEL}: {run.stderr.strip()}")
    return next(folder.glob("tritonclient-*.whl"))


def _unpack(wheel: Path, binary: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        if _PROGRAM_IN_WHEEL not in archive.namelist():
            raise PerfAnalyzerNotFoundError(
                f"{wheel.name} has no {_PROGRAM}; there is one for Linux on x86-64 only"
            )
        draft = binary.with_suffix(".draft")
        draft.write_bytes(archive.read(_PROGRAM_IN_WHEEL))
    draft.chmod(0o755)
    draft.rename(binary)
    wheel.unlink()


def _wheel_libraries() -> Path | None:
    """The folder of libraries that the nvidia-pytriton wheel brings along."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]).parent / "nvidia_pytriton.libs"


def _link_libraries(source: Path | None, target: Path) -> None:
    """Give the libraries the names asked for; what `source` lacks may be installed."""
    target.mkdir(exist_ok=True)
    for name, pattern in _LIBRARIES.items():
        link = target / name
        link.unlink(missing_ok=True)
        found = next(source.glob(pattern), None) if source else None
        if found is not None:
            link.symlink_to(found.resolve())


def _check(found: PerfAnalyzer) -> None:
    command = [str(found.binary), "--version"]
    run = subprocess.run(command, env=found.environment, capture_output=True, text=True)
    if run.returncode:
        raise PerfAnalyzerNotFoundError(
            f"{_PROGRAM} does not run here: {(run.stderr or run.stdout).strip()}"
        )
