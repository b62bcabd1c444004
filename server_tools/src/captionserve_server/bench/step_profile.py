"""Where the time of a decoding step goes: the graphs, and everything else.

    python -m captionserve_server.bench.step_profile --model-repository DIR [--json FILE]

Serves a model repository, keeps a number of captions decoding at once, and reads from Triton's
metrics how long the engine's steps took and how much of that ONNX Runtime ran. What is left is
ours: BLS and its transport, numpy, scheduling. Only time in which exactly that many captions were
live is counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from captionserve import CaptionClient, CaptionResult, GenerationOptions
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from captionserve_server.serving.launch import launched_service

_TIMEOUT_SECONDS = 600.0
_POLL_SECONDS = 0.05
_GRAPHS = ("prefill", "step", "top")
# A window shorter than this many steps is not worth a line.
_FEWEST_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Window:
    """A time in which the same number of captions was live.

    Attributes:
        steps: decoding steps in it.
        step_ms: mean length of a step.
        graphs_ms: of which ONNX Runtime ran.
    """

    steps: int
    step_ms: float
    graphs_ms: float

    @property
    def ours(self) -> float:
        """The share of a step that is not ONNX Runtime's."""
        return 1.0 - self.graphs_ms / self.step_ms


@dataclasses.dataclass(frozen=True)
class _Reading:
    live: int
    waiting: int
    steps: int
    engine_seconds: float
    graph_seconds: float


def read_metrics(address: str) -> _Reading:
    """What Triton's metrics at host:port say now of `captioner` and the decoder's graphs."""
    with urllib.request.urlopen(f"http://{address}/metrics") as answer:
        text = answer.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("model", "captioner") == "captioner":
                values[sample.name.removeprefix("captionserve_")] = sample.value
    return _Reading(
        live=int(values["live_captions"]),
        waiting=int(values["waiting_captions"]),
        steps=int(values["engine_steps_total"]),
        engine_seconds=values["engine_seconds_total"],
        graph_seconds=sum(values[f"{graph}_seconds_total"] for graph in _GRAPHS),
    )


def measure(metrics_address: str, client: CaptionClient, live: int, tokens: int) -> list[Window]:
    """Caption `live` images at once with 4 beams; the windows in which all of them were live."""
    options = GenerationOptions(num_beams=4, min_length=tokens, max_length=tokens)
    with _captioning(client, options, live) as futures:
        windows: list[Window] = []
        first: _Reading | None = None
        last: _Reading | None = None
        while not all(future.done() for future in futures):
            reading = read_metrics(metrics_address)
            if reading.live == live:
                first, last = first or reading, reading
            elif first is not None and last is not None:
                windows += _window(first, last)
                first = last = None
            time.sleep(_POLL_SECONDS)
    return windows


def _window(first: _Reading, last: _Reading) -> list[Window]:
    steps = last.steps - first.steps
    if steps < _FEWEST_STEPS:
        return []
    return [
        Window(
            steps,
            1e3 * (last.engine_seconds - first.engine_seconds) / steps,
            1e3 * (last.graph_seconds - first.graph_seconds) / steps,
        )
    ]


@contextmanager
def _captioning(
    client: CaptionClient, options: GenerationOptions, images: int
) -> Iterator[list[Future[CaptionResult]]]:
    pixels = np.random.default_rng(0).integers(0, 256, (images, 64, 64, 3), dtype=np.uint8)
    with ThreadPoolExecutor(images) as pool:
        yield [pool.submit(client.caption, image, options, bypass_cache=True) for image in pixels]


def profile(repository: Path, live: int, tokens: int, rounds: int) -> list[Window]:
    """Serve a model repository and measure it `rounds` times, after a round to warm up."""
    with (
        launched_service(repository) as service,
        CaptionClient(service.grpc, timeout=_TIMEOUT_SECONDS) as client,
    ):
        measure(service.triton_metrics, client, live, tokens)
        return [
            window
            for _ in range(rounds)
            for window in measure(service.triton_metrics, client, live, tokens)
        ]


def _table(windows: list[Window], live: int) -> Table:
    table = Table("", "median", "lowest", "highest", title=f"a step of {live} captions, 4 beams")
    rows: dict[str, list[float]] = {
        "steps": [float(window.steps) for window in windows],
        "step, ms": [window.step_ms for window in windows],
        "graphs, ms": [window.graphs_ms for window in windows],
        "everything else, ms": [window.step_ms - window.graphs_ms for window in windows],
        "everything else, %": [100 * window.ours for window in windows],
    }
    for name, values in rows.items():
        spread = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.1f}" for value in spread))
    return table


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-repository", type=Path, required=True)
    parser.add_argument("--live", type=int, default=16, help="captions decoded at once")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each caption")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the windows to")
    arguments = parser.parse_args()
    windows = profile(
        arguments.model_repository, arguments.live, arguments.tokens, arguments.rounds
    )
    if not windows:
        raise SystemExit("no time in which all captions were live; give them more tokens")
    Console().print(_table(windows, arguments.live))
    if arguments.json:
        values = [dataclasses.asdict(window) | {"ours": window.ours} for window in windows]
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
