"""perf_analyzer: found or fetched, what it is sent and what is kept of it; a script stands in."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from captionserve_server.bench import perf_analyzer
from captionserve_server.bench.perf_analyzer import (
    find_perf_analyzer,
    input_data,
    run_sweep,
)
from captionserve_server.bench.programs import ProgramError
from captionserve_server.triton import wire

# As a real run of 16 requests in flight left it.
CSV = (Path(__file__).parent / "in_flight_16.csv").read_text()
# Writes the CSV of the load that it is asked for; fails at 99, and is not stable at 64.
PROGRAM = """
import sys
arguments = sys.argv[1:]
load = arguments[arguments.index("--concurrency-range") + 1]
print("a report of", load)
if load in ("64", "99"):
    sys.exit({{"64": 2, "99": 99}}[load])
with open(arguments[arguments.index("-f") + 1], "w") as table:
    table.write({csv!r}.replace("\\n16,", "\\n" + load + ","))
"""
COMMAND = [sys.executable, "-c", PROGRAM.format(csv=CSV), "--concurrency-range"]


def test_a_program_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "perf_analyzer"
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_perf_analyzer(tmp_path / "folder") == [str(program)]
    assert not (tmp_path / "folder").exists()


def test_the_wheels_program_finds_its_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled = tmp_path / "packages" / "nvidia_pytriton.libs"
    bundled.mkdir(parents=True)
    (bundled / "libb64-98cb6333.so.0d").write_bytes(b"b64")
    (bundled / "libcudart-09529672.so.12.6.77").write_bytes(b"cudart")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "packages"))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))

    def install(folder: Path, wheel: str) -> Path:
        program = folder / "bin" / "perf_analyzer"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n/bin/cat ${LD_LIBRARY_PATH%%:*}/libb64.so.0d\n")
        program.chmod(0o755)
        return folder

    monkeypatch.setattr(perf_analyzer, "packages_in", install)
    program = find_perf_analyzer(tmp_path / "kept")
    assert find_perf_analyzer(tmp_path / "kept") == program
    assert subprocess.run(program, capture_output=True, check=True).stdout == b"b64"
    assert (tmp_path / "kept" / "lib" / "libcudart.so.12").read_bytes() == b"cudart"


def test_requests_are_tensors_of_the_captioner() -> None:
    options = {"num_beams": 4, "max_length": 17}
    content = json.loads(json.dumps(input_data([b"first", b"second one"], options)))
    sent = [base64.b64decode(entry["IMAGE"]["b64"]) for entry in content["data"]]
    assert sent == [b"\x05\0\0\0first", b"\x0a\0\0\0second one"]
    names = {spec.name for spec in wire.CAPTIONER.inputs}
    for entry in content["data"]:
        assert set(entry) <= names
        assert json.loads(entry["OPTIONS"][0]) == options


def test_a_sweep_keeps_what_the_program_wrote(tmp_path: Path) -> None:
    output = tmp_path / "new" / "concurrency.txt"
    rows = run_sweep(COMMAND, [1, 16], output)
    assert [row["Concurrency"] for row in rows] == ["1", "16"]
    header, first, sixteenth = output.with_suffix(".csv").read_text().splitlines()
    assert [header, sixteenth] == CSV.splitlines()
    assert first == sixteenth.replace("16,", "1,", 1)
    assert output.read_text().split("\n") == ["a report of 1", "", "a report of 16", ""]


def test_a_load_that_is_not_stable_is_left_out(tmp_path: Path) -> None:
    rows = run_sweep(COMMAND, [16, 64], tmp_path / "concurrency.txt")
    assert [row["Concurrency"] for row in rows] == ["16"]
    with pytest.raises(ProgramError, match="no load was stable\na report of 64"):
        run_sweep(COMMAND, [64], tmp_path / "concurrency.txt")


def test_a_failure_tells_what_was_printed(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="a report of 99"):
        run_sweep(COMMAND, [16, 99], tmp_path / "concurrency.txt")
