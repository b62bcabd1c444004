"""Finding perf_analyzer; a script stands in for the program, in a wheel and on PATH."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from captionserve_server.bench import perf_binary
from captionserve_server.bench.perf_binary import PerfAnalyzerNotFoundError, find_perf_analyzer

RUNS = "#!/bin/sh\nexit 0\n"
DOES_NOT_RUN = "#!/bin/sh\necho libb64.so.0d is missing >&2\nexit 127\n"
IN_WHEEL = "tritonclient-2.50.0.data/data/bin/perf_analyzer"


@pytest.fixture
def no_program_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[Path]]:
    """Have a wheel with one file downloaded; the list fills with where to."""

    def prepare(name: str, content: str) -> list[Path]:
        folders: list[Path] = []

        def fake(folder: Path) -> Path:
            folders.append(folder)
            wheel = folder / "tritonclient-2.50.0-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(name, content)
            return wheel

        monkeypatch.setattr(perf_binary, "_download", fake)
        return folders

    return prepare


def test_a_program_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "perf_analyzer"
    program.write_text(RUNS)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = find_perf_analyzer(tmp_path / "folder")
    assert found.binary == program
    assert found.libraries is None
    assert not (tmp_path / "folder").exists()


@pytest.mark.usefixtures("no_program_on_path")
def test_the_wheels_program_is_fetched_once(
    tmp_path: Path, download: Callable[[str, str], list[Path]]
) -> None:
    folders = download(IN_WHEEL, RUNS)
    first = find_perf_analyzer(tmp_path)
    assert first.binary.read_text() == RUNS
    assert first.environment["LD_LIBRARY_PATH"].split(":")[0] == str(first.libraries)
    assert find_perf_analyzer(tmp_path) == first
    assert folders == [tmp_path]


@pytest.mark.usefixtures("no_program_on_path")
def test_libraries_get_the_names_that_are_asked_for(
    tmp_path: Path,
    download: Callable[[str, str], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    download(IN_WHEEL, RUNS)
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    (bundled / "libb64-98cb6333.so.0d").write_bytes(b"b64")
    (bundled / "libcudart-09529672.so.12.6.77").write_bytes(b"cudart")
    monkeypatch.setattr(perf_binary, "_wheel_libraries", lambda: bundled)
    libraries = find_perf_analyzer(tmp_path / "folder").libraries
    assert libraries is not None
    assert (libraries / "libb64.so.0d").read_bytes() == b"b64"
    assert (libraries / "libcudart.so.12").read_bytes() == b"cudart"


@pytest.mark.usefixtures("no_program_on_path")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IN_WHEEL, DOES_NOT_RUN, "libb64.so.0d is missing"),
        ("tritonclient/__init__.py", "", "has no perf_analyzer"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path,
    download: Callable[[str, str], list[Path]],
    name: str,
    content: str,
    message: str,
) -> None:
    download(name, content)
    with pytest.raises(PerfAnalyzerNotFoundError, match=message):
        find_perf_analyzer(tmp_path)
