"""Other people's programs and packages; a wheel of our own stands in for one from an index."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
from captionserve_server.bench.programs import ProgramError, packages_in, run_program

METADATA = "Metadata-Version: 2.1\nName: example\nVersion: {0}\nRequires-Dist: no-such-thing\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel(folder: Path, version: str) -> str:
    path = folder / f"example-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("example.py", f"version = {version!r}\n")
        info = f"example-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", METADATA.format(version))
        archive.writestr(f"{info}/WHEEL", WHEEL)
        archive.writestr(f"{info}/RECORD", "")
    return str(path)


def test_packages_are_installed_without_others_once_until_others_are_wanted(tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    first = wheel(tmp_path, "1.0")
    assert packages_in(folder, first) == folder
    module = folder / "example.py"
    assert module.read_text() == "version = '1.0'\n"
    module.write_text("kept")
    packages_in(folder, first)
    assert module.read_text() == "kept"
    packages_in(folder, wheel(tmp_path, "2.0"))
    assert module.read_text() == "version = '2.0'\n"


def test_what_cannot_be_installed_is_tried_again(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ProgramError, match=r"example-1\.0"):
            packages_in(tmp_path / "packages", str(tmp_path / "example-1.0-py3-none-any.whl"))


def test_a_program_that_fails_says_what_it_printed() -> None:
    run_program(sys.executable, "-c", "print('fine')")
    with pytest.raises(ProgramError, match=r"python\S* failed\nno libb64"):
        run_program(sys.executable, "-c", "import sys; sys.exit('no libb64')")
