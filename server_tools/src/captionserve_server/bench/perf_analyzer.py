"""NVIDIA's perf_analyzer against the `captioner` model of a running Triton.

    python -m captionserve_server.bench.perf_analyzer [--model-repository DIR] [--output DIR]

First a number of requests in flight, then requests at a rate that does not wait for answers, by
default in shares of what the first sweep reached. Every request is a JPEG file with a NONCE of its
own, and the response cache is off, so that each is computed. The program's CSV and report of both
sweeps are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from captionserve_server.bench.perf_binary import (
    PerfAnalyzer,
    PerfAnalyzerNotFoundError,
    find_perf_analyzer,
)
from captionserve_server.bench.perf_input import input_data, scene_images
from captionserve_server.bench.perf_report import (
    Measurement,
    join_csv,
    latency_table,
    model_table,
    parse_measurement,
)
from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.ready import ReadyReport
from captionserve_server.serving.temporary import served_checkpoint
from captionserve_server.triton import wire

_NO_CACHE = ("--response-cache-megabytes", "0")
_SHARES_OF_BEST = (0.25, 0.5, 0.75)
# The models that do their work while Triton counts; captioner and preprocess answer later.
_TIMED_MODELS = (wire.VISION_ENCODER, wire.DECODER_STEP)
# A measurement is the mean of three windows, once they agree; perf_analyzer tries so often.
_WINDOWS = 10
# The exit status when they never agree.
_NOT_STABLE = 2


class PerfAnalyzerError(RuntimeError):
    """perf_analyzer ended with an error; the message ends with what it printed."""


@dataclass(frozen=True)
class Target:
    """What is measured, and how.

    Attributes:
        address: host:port of Triton's gRPC service.
        input_data: file of the requests.
        window_seconds: length of a window.
        stability_percent: how far apart throughput and mean latency of three windows may be.
    """

    address: str
    input_data: Path
    window_seconds: float
    stability_percent: float

    @property
    def arguments(self) -> list[str]:
        """The part of perf_analyzer's command line that is the same for every load."""
        return [
            *("-m", wire.CAPTIONER.name, "-i", "grpc", "-u", self.address, "--async"),
            *("--input-data", str(self.input_data)),
            *("--bls-composing-models", ",".join(model.name for model in _TIMED_MODELS)),
            *("--measurement-interval", str(round(1000 * self.window_seconds))),
            *("--stability-percentage", f"{self.stability_percent:g}"),
            *("--max-trials", str(_WINDOWS), "--verbose-csv"),
        ]


@dataclass(frozen=True)
class Sweep:
    """A kind of load, and how much of it.

    Attributes:
        name: of its files.
        load: what the loads count.
        flags: of perf_analyzer for this kind, each load behind the last of them.
        loads: in their order.
    """

    name: str
    load: str
    flags: tuple[str, ...]
    loads: tuple[float, ...]

    def arguments(self, load: float) -> list[str]:
        """The part of perf_analyzer's command line that says the load."""
        return [*self.flags, f"{load:g}"]


def concurrency_sweep(loads: Sequence[float]) -> Sweep:
    """So many requests always in flight."""
    return Sweep("concurrency", "in flight", ("--concurrency-range",), tuple(loads))


def rate_sweep(loads: Sequence[float]) -> Sweep:
    """Requests that arrive by chance, so many a second in the mean."""
    flags = ("--request-distribution", "poisson", "--request-rate-range")
    return Sweep("rate", "requests/s", flags, tuple(loads))


def default_rates(measurements: Sequence[Measurement]) -> list[float]:
    """Rates that leave the service room, in shares of the most that it reached."""
    best = max(one.images_per_second for one in measurements)
    return [float(f"{share * best:.2g}") for share in _SHARES_OF_BEST]


def run_sweep(
    program: PerfAnalyzer, target: Target, sweep: Sweep, output: Path
) -> list[Measurement]:
    """Measure every load, and keep the program's CSV and report in `output`.

    Returns:
        The loads at which the service was stable.

    Raises:
        PerfAnalyzerError: if a load cannot be measured, or the service was stable at none.
    """
    runs = [_run(program, [*target.arguments, *sweep.arguments(load)]) for load in sweep.loads]
    stable = [(run.table, run.report) for run in runs if run.table is not None]
    if not stable:
        raise PerfAnalyzerError(f"no load was stable\n{runs[-1].report}")
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{sweep.name}.csv").write_text(join_csv([table for table, _ in stable]))
    (output / f"{sweep.name}.txt").write_text("\n".join(run.report for run in runs))
    return [parse_measurement(table, report) for table, report in stable]


@dataclass(frozen=True)
class _Run:
    """What one run left behind: its CSV, if the service was stable, and what it printed."""

    table: str | None
    report: str


def _run(program: PerfAnalyzer, arguments: list[str]) -> _Run:
    with tempfile.TemporaryDirectory(prefix="captionserve-perf-") as folder:
        table = Path(folder) / "perf.csv"
        command = [str(program.binary), *arguments, "-f", str(table)]
        run = subprocess.run(command, env=program.environment, capture_output=True, text=True)
        if run.returncode == _NOT_STABLE:
            return _Run(None, run.stdout)
        if run.returncode or not table.exists():
            raise PerfAnalyzerError(f"perf_analyzer failed\n{run.stdout}{run.stderr}")
        return _Run(table.read_text(), run.stdout)


@contextmanager
def _service(arguments: argparse.Namespace, console: Console) -> Iterator[ReadyReport]:
    if arguments.model_repository is None:
        with served_checkpoint(arguments.checkpoint, console.print, *_NO_CACHE) as service:
            yield service
    else:
        with launched_service(arguments.model_repository, *_NO_CACHE) as service:
            yield service


@contextmanager
def _requests(options: dict[str, int]) -> Iterator[Path]:
    """A file of requests, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="captionserve-perf-") as folder:
        path = Path(folder) / "requests.json"
        path.write_text(json.dumps(input_data(list(scene_images()), options)))
        yield path


def _options(arguments: argparse.Namespace) -> dict[str, int]:
    options = {"num_beams": arguments.num_beams}
    if arguments.length is not None:
        options |= {"min_length": arguments.length, "max_length": arguments.length}
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="perf_analyzer against the captioner model.")
    parser.add_argument("--checkpoint", default="demo/checkpoint")
    parser.add_argument("--model-repository", type=Path, help="an exported one, served instead")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rates", type=float, nargs="+", help="requests a second")
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--length", type=int, help="of every caption, with its start token")
    parser.add_argument("--window-seconds", type=float, default=5.0)
    parser.add_argument("--stability-percent", type=float, default=25.0)
    parser.add_argument("--output", type=Path, default=Path("docs/measurements/perf"))
    parser.add_argument(
        "--program-folder", type=Path, default=Path("build/perf_analyzer"), help="where it is kept"
    )
    return parser


def _print(console: Console, sweep: Sweep, measurements: Sequence[Measurement]) -> None:
    console.print(latency_table(sweep.load, measurements))
    console.print(model_table(sweep.load, measurements))


def main() -> None:
    """Fetch the program, serve, measure, print."""
    arguments = _parser().parse_args()
    console = Console()
    try:
        program = find_perf_analyzer(arguments.program_folder)
        with _service(arguments, console) as service, _requests(_options(arguments)) as requests:
            target = Target(
                service.triton_grpc,
                requests,
                window_seconds=arguments.window_seconds,
                stability_percent=arguments.stability_percent,
            )
            sweep = concurrency_sweep(arguments.concurrency)
            measured = run_sweep(program, target, sweep, arguments.output)
            _print(console, sweep, measured)
            sweep = rate_sweep(arguments.rates or default_rates(measured))
            _print(console, sweep, run_sweep(program, target, sweep, arguments.output))
    except (PerfAnalyzerNotFoundError, PerfAnalyzerError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
