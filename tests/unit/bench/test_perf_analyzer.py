"""perf_analyzer's command line and what is kept of its runs; a script stands in for the program."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from captionserve_server.bench.perf_analyzer import (
    PerfAnalyzerError,
    Target,
    concurrency_sweep,
    default_rates,
    rate_sweep,
    run_sweep,
)
from captionserve_server.bench.perf_binary import PerfAnalyzer
from captionserve_server.bench.perf_report import parse_measurement

from tests.unit.perf_analyzer.test_report import CSV, REPORT

# Writes the CSV of the load that it is asked for; fails at 99, and is not stable at 64.
PROGRAM = """#!{python}
import sys
arguments = sys.argv[1:]
load = arguments[arguments.index("--concurrency-range") + 1]
print({report!r})
if load in ("64", "99"):
    sys.exit({{"64": 2, "99": 99}}[load])
with open(arguments[arguments.index("-f") + 1], "w") as table:
    table.write({csv!r}.replace("\\n16,", "\\n" + load + ","))
"""


@pytest.fixture
def program(tmp_path: Path) -> PerfAnalyzer:
    path = tmp_path / "perf_analyzer"
    path.write_text(PROGRAM.format(python=sys.executable, report=REPORT, csv=CSV))
    path.chmod(0o755)
    return PerfAnalyzer(path)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target("127.0.0.1:1", tmp_path / "in.json", window_seconds=2.5, stability_percent=20)


def test_the_command_line_says_what_is_measured(target: Target) -> None:
    line = " ".join(target.arguments)
    assert "-m captioner -i grpc -u 127.0.0.1:1 " in line
    assert f"--input-data {target.input_data} " in line
    assert "--bls-composing-models vision_encoder,decoder_step " in line
    assert "--measurement-interval 2500 " in line
    assert "--stability-percentage 20 " in line


def test_a_sweep_says_the_load() -> None:
    assert concurrency_sweep([4]).arguments(4) == ["--concurrency-range", "4"]
    assert rate_sweep([12.5]).arguments(12.5)[-2:] == ["--request-rate-range", "12.5"]
    assert "poisson" in rate_sweep([12.5]).arguments(12.5)


def test_a_sweep_keeps_what_the_program_wrote(
    program: PerfAnalyzer, target: Target, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "folder"
    measured = run_sweep(program, target, concurrency_sweep([1, 16]), output)
    assert [one.load for one in measured] == [1, 16]
    kept = (output / "concurrency.csv").read_text().splitlines()
    assert kept[0] == CSV.splitlines()[0]
    assert kept[2] == CSV.splitlines()[1]
    assert (output / "concurrency.txt").read_text().count("Composing models:") == 2


def test_a_load_that_is_not_stable_is_left_out(
    program: PerfAnalyzer, target: Target, tmp_path: Path
) -> None:
    measured = run_sweep(program, target, concurrency_sweep([16, 64]), tmp_path)
    assert [one.load for one in measured] == [16]
    with pytest.raises(PerfAnalyzerError, match="no load was stable"):
        run_sweep(program, target, concurrency_sweep([64]), tmp_path)


def test_a_failure_tells_what_was_printed(
    program: PerfAnalyzer, target: Target, tmp_path: Path
) -> None:
    with pytest.raises(PerfAnalyzerError, match="Composing models"):
        run_sweep(program, target, concurrency_sweep([16, 99]), tmp_path)


def test_rates_stay_below_the_best_of_the_first_sweep() -> None:
    slow = CSV.replace("45.2886", "11.0")
    measured = [parse_measurement(text, REPORT) for text in (slow, CSV)]
    assert default_rates(measured) == [11.0, 23.0, 34.0]
