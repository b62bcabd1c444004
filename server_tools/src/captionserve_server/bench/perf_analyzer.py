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
import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

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
_THROUGHPUT = "Inferences/Second"

_console = Console(highlight=False, markup=False)

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
    for name, pattern in _LIBRARIES.items():
        for found in Path(sysconfig.get_path("platlib"), "nvidia_pytriton.libs").glob(pattern):
            (libraries / name).unlink(missing_ok=True)
            (libraries / name).symlink_to(found)
    path = os.pathsep.join(filter(None, (str(libraries), os.environ.get("LD_LIBRARY_PATH"))))
    return ["/usr/bin/env", f"LD_LIBRARY_PATH={path}", packages / "bin" / "perf_analyzer"]


def input_data(images: Sequence[bytes], options: Mapping[str, int]) -> dict[str, object]:
    """perf_analyzer's input data, to be written as JSON: a request for each encoded image."""
    # perf_analyzer sends decoded base64 as it is; Triton's strings begin with their length.
    elements = (len(image).to_bytes(4, "little") + image for image in images)
    encoded = (base64.b64encode(element).decode() for element in elements)
    chosen = [json.dumps(options)]
    return {
        "data": [{wire.IMAGE.name: {"b64": each}, wire.OPTIONS.name: chosen} for each in encoded]
    }


def run_sweep(command: Program, loads: Sequence[float], output: Path) -> list[dict[str, str]]:
    """Measure several loads; print and keep the program's reports, and its CSV beside them.

    Args:
        command: perf_analyzer up to the load, which is added.
        loads: in their order.
        output: the file of the reports.

    Returns:
        The CSV's rows, one for each load at which the service was stable.

    Raises:
        ProgramError: if a load cannot be measured, or the service was stable at none.
    """
    lines: list[str] = []
    reports: list[str] = []
    with tempfile.TemporaryDirectory(prefix="captionserve-perf-") as folder:
        for load in loads:
            table = Path(folder, f"{load:g}.csv")
            full = [*command, f"{load:g}", "-f", table]
            run = subprocess.run(full, capture_output=True, text=True, check=False)
            reports.append(run.stdout)
            _console.print(run.stdout)
            if run.returncode == _NOT_STABLE:
                continue
            if run.returncode or not table.exists():
                raise ProgramError(f"perf_analyzer failed\n{run.stdout}{run.stderr}")
            header, *measured = table.read_text().splitlines()
            lines = [*(lines or [header]), *measured]
    if not lines:
        raise ProgramError(f"no load was stable\n{reports[-1]}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(reports))
    output.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    return list(csv.DictReader(lines))


def main() -> None:
    """Fetch the program, serve, measure."""
    parser = argparse.ArgumentParser(description="perf_analyzer against the captioner model.")
    parser.add_argument("--model-repository", type=Path, help="served in place of the demo's")
    parser.add_argument("--length", type=int, help="of every caption, with its start token")
    parser.add_argument("--output", type=Path, default=Path("docs/measurements/perf"))
    arguments = parser.parse_args()
    options = {"num_beams": _NUM_BEAMS}
    if arguments.length is not None:
        options |= {"min_length": arguments.length, "max_length": arguments.length}
    if arguments.model_repository is None:
        serving = served_checkpoint("demo/checkpoint", _console.print)
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
            in_flight = [*command, "--concurrency-range"]
            rows = run_sweep(in_flight, _IN_FLIGHT, arguments.output / "concurrency.txt")
            # Rates that leave the service room, in two digits.
            best = max(float(row[_THROUGHPUT]) for row in rows)
            rates = [float(f"{share * best:.2g}") for share in _SHARES_OF_BEST]
            run_sweep([*command, *_RATE], rates, arguments.output / "rate.txt")
    except ProgramError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
