"""NVIDIA's perf_analyzer against the `captioner` model of a running Triton.

    python -m captionserve_server.bench.perf_analyzer [--model-repository DIR] [--length N]

First a number of requests in flight, then requests at a rate that does not wait for answers, in
shares of what the first sweep reached. Every request is a JPEG file, and `captioner` remembers
nothing, so that each is computed. The program's CSV and report of both sweeps are kept.

The last wheels of tritonclient that carry the program and run with glibc 2.34 are those of 2.50. It
wants two libraries that few machines have; the nvidia-pytriton wheel has them, under names of its
own.
"""

from __future__ import annotations

import argparse
import base64
import csv
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from captionserve_server.bench.images import bench_images
from captionserve_server.bench.programs import ProgramError, packages_in
from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.temporary import served_checkpoint
from captionserve_server.triton import wire

_WHEEL = "tritonclient==2.50.0"
# What the program asks for, and how the nvidia-pytriton wheel names it.
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
_PROGRAM_FOLDER = Path("build/perf_analyzer")

_IMAGES = 64
_NUM_BEAMS = 4
_IN_FLIGHT = (1, 4, 16, 64)
_SHARES_OF_BEST = (0.25, 0.5, 0.75)
_RATE = ("--request-distribution", "poisson", "--request-rate-range")
# A measurement is the mean of three windows of 5 seconds, once their throughput and mean latency
# are no further apart than 25 %; the program tries ten windows.
_WINDOWS = ("--measurement-interval", "5000", "--stability-percentage", "25", "--max-trials", "10")
# The exit status when they never agree.
_NOT_STABLE = 2
_PERCENTILES = (50, 90, 95, 99)
_THROUGHPUT = "Inferences/Second"

Program = Sequence[str | Path]
"""A command that runs perf_analyzer, to which arguments are added."""


def find_perf_analyzer(folder: Path) -> Program:
    """The perf_analyzer on PATH, else one fetched into `folder`, where it stays for the next time.

    Raises:
        ProgramError: if it cannot be fetched.
    """
    if on_path := shutil.which("perf_analyzer"):
        return [on_path]
    packages = packages_in(folder, _WHEEL)
    libraries = packages / "lib"
    libraries.mkdir(exist_ok=True)
    # What is not brought along may be installed.
    pytriton = importlib.util.find_spec("pytriton")
    if pytriton is not None and pytriton.origin is not None:
        for name, pattern in _LIBRARIES.items():
            for found in Path(pytriton.origin).parents[1].glob(f"nvidia_pytriton.libs/{pattern}"):
                (libraries / name).unlink(missing_ok=True)
                (libraries / name).symlink_to(found.resolve())
    path = os.pathsep.join(filter(None, (str(libraries), os.environ.get("LD_LIBRARY_PATH"))))
    return ["/usr/bin/env", f"LD_LIBRARY_PATH={path}", packages / "bin" / "perf_analyzer"]


def input_data(images: Sequence[bytes], options: Mapping[str, int]) -> dict[str, object]:
    """perf_analyzer's input data, to be written as JSON: a request for each encoded image."""
    # perf_analyzer sends decoded base64 as it is; Triton's strings begin with their length.
    elements = (len(image).to_bytes(4, "little") + image for image in images)
    chosen = [json.dumps(options)]
    return {
        "data": [
            {
                wire.IMAGE.name: {"b64": base64.b64encode(element).decode()},
                wire.OPTIONS.name: chosen,
            }
            for element in elements
        ]
    }


def run_sweep(
    command: Program, flags: Sequence[str], loads: Sequence[float], output: Path
) -> list[dict[str, str]]:
    """Measure several loads, and keep the program's CSV and reports.

    Args:
        command: perf_analyzer, with what is the same for every load.
        flags: a kind of load; how much of it follows.
        loads: in their order.
        output: the file of the reports; the CSV lies beside it.

    Returns:
        The CSV's rows, one for each load at which the service was stable.

    Raises:
        ProgramError: if a load cannot be measured, or the service was stable at none.
    """
    rows: list[dict[str, str]] = []
    reports: list[str] = []
    with tempfile.TemporaryDirectory(prefix="captionserve-perf-") as folder:
        for load in loads:
            table = Path(folder) / f"{load:g}.csv"
            full = [*command, *flags, f"{load:g}", "-f", table]
            run = subprocess.run(full, capture_output=True, text=True, check=False)
            reports.append(run.stdout)
            if run.returncode == _NOT_STABLE:
                continue
            if run.returncode or not table.exists():
                raise ProgramError(f"perf_analyzer failed\n{run.stdout}{run.stderr}")
            rows += csv.DictReader(table.read_text().splitlines())
    if not rows:
        raise ProgramError(f"no load was stable\n{reports[-1]}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(reports))
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def latency_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """What callers saw, one row for each load, which is the CSV's first column."""
    load = next(iter(rows[0]))
    table = Table(load, "images/s", *(f"p{rank}, ms" for rank in _PERCENTILES))
    for row in rows:
        latencies = [float(row[f"p{rank} latency"]) / 1e3 for rank in _PERCENTILES]
        table.add_row(row[load], row[_THROUGHPUT], *(f"{each:.0f}" for each in latencies))
    return table


def main() -> None:
    """Fetch the program, serve, measure, print."""
    parser = argparse.ArgumentParser(description="perf_analyzer against the captioner model.")
    parser.add_argument("--model-repository", type=Path, help="served in place of the demo's")
    parser.add_argument("--length", type=int, help="of every caption, with its start token")
    parser.add_argument("--output", type=Path, default=Path("docs/measurements/perf"))
    arguments = parser.parse_args()
    options = {"num_beams": _NUM_BEAMS}
    if arguments.length is not None:
        options |= {"min_length": arguments.length, "max_length": arguments.length}
    console = Console()
    if arguments.model_repository is None:
        serving = served_checkpoint("demo/checkpoint", console.print)
    else:
        serving = launched_service(arguments.model_repository)
    try:
        program = find_perf_analyzer(_PROGRAM_FOLDER)
        with serving as service, tempfile.NamedTemporaryFile("w", suffix=".json") as requests:
            json.dump(input_data(bench_images(_IMAGES), options), requests)
            requests.flush()
            command = [
                *(*program, "-m", wire.CAPTIONER.name, "-i", "grpc", "-u", service.triton_grpc),
                *("--async", "--input-data", requests.name, "--verbose-csv", *_WINDOWS),
            ]
            output = arguments.output / "concurrency.txt"
            rows = run_sweep(command, ["--concurrency-range"], _IN_FLIGHT, output)
            console.print(latency_table(rows))
            # Rates that leave the service room, in two digits.
            best = max(float(row[_THROUGHPUT]) for row in rows)
            rates = [float(f"{share * best:.2g}") for share in _SHARES_OF_BEST]
            rows = run_sweep(command, _RATE, rates, arguments.output / "rate.txt")
            console.print(latency_table(rows))
    except ProgramError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
