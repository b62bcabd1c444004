"""Where the time of a round of the engine goes: the graphs, and everything else.

    python -m captionserve_server.bench.step_profile --model-repository DIR [--json FILE]

Serves a model repository with room for a number of captions, keeps more than that in flight, and
reads from Triton's metrics how long the engine's steps took and how much of that ONNX Runtime ran.
What is left is ours: BLS and its transport, numpy, scheduling. Only time in which captions waited
for room is counted: then the batch is full, and a round of the engine has newcomers to encode and
to prefill for those who left, as in service.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import tempfile
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
from captionserve_server.triton.wire import CAPTIONER, VISION_ENCODER

_TIMEOUT_SECONDS = 600.0
_POLL_SECONDS = 0.05
_COMPUTE_TIME = "nv_inference_compute_infer_duration_us_total"
_GRAPHS = ("prefill", "step", "top")
# Steps of one window; a window is one sample of the median.
_WINDOW_STEPS = 20
# Captions in flight, and captions in all, for each that is live.
_IN_FLIGHT = 2
_IN_ALL = 6


@dataclasses.dataclass(frozen=True)
class Window:
    """A time in which the batch was full.

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
    encoder_us = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            model = sample.labels.get("model", CAPTIONER.name)
            if model == CAPTIONER.name:
                values[sample.name.removeprefix("captionserve_")] = sample.value
            elif (sample.name, model) == (_COMPUTE_TIME, VISION_ENCODER.name):
                encoder_us += sample.value
    return _Reading(
        live=int(values["live_captions"]),
        waiting=int(values["waiting_captions"]),
        steps=int(values["engine_steps_total"]),
        engine_seconds=values["engine_seconds_total"],
        graph_seconds=encoder_us / 1e6 + sum(values[f"{graph}_seconds_total"] for graph in _GRAPHS),
    )


def measure(metrics_address: str, client: CaptionClient, live: int, tokens: int) -> list[Window]:
    """Caption many images with 4 beams, `live` at once; the windows in which others waited."""
    options = GenerationOptions(num_beams=4, min_length=tokens, max_length=tokens)
    windows: list[Window] = []
    with _captioning(client, options, live) as futures:
        first: _Reading | None = None
        while not all(future.done() for future in futures):
            reading = read_metrics(metrics_address)
            if not reading.waiting:
                first = None
            elif first is None:
                first = reading
            elif reading.steps - first.steps >= _WINDOW_STEPS:
                windows.append(_window(first, reading))
                first = reading
            time.sleep(_POLL_SECONDS)
    return windows


def _window(first: _Reading, last: _Reading) -> Window:
    steps = last.steps - first.steps
    return Window(
        steps,
        1e3 * (last.engine_seconds - first.engine_seconds) / steps,
        1e3 * (last.graph_seconds - first.graph_seconds) / steps,
    )


@contextmanager
def _captioning(
    client: CaptionClient, options: GenerationOptions, live: int
) -> Iterator[list[Future[CaptionResult]]]:
    shape = (_IN_ALL * live, 64, 64, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with ThreadPoolExecutor(_IN_FLIGHT * live) as pool:
        yield [pool.submit(client.caption, image, options, bypass_cache=True) for image in pixels]


@contextmanager
def _with_room_for(repository: Path, live: int) -> Iterator[Path]:
    """The same model repository, with room in its captioner for `live` captions of 4 beams."""
    with tempfile.TemporaryDirectory(prefix="captionserve-profile-") as name:
        folder = Path(name)
        for model in repository.iterdir():
            (folder / model.name).mkdir()
            for entry in model.iterdir():
                (folder / model.name / entry.name).symlink_to(entry.resolve())
        config = folder / CAPTIONER.name / "config.pbtxt"
        text = config.read_text()
        config.unlink()
        limited = f'"max_rows" value {{ string_value: "{4 * live}" }}'
        config.write_text(re.sub(r'"max_rows" value { string_value: "\d+" }', limited, text))
        yield folder


def profile(repository: Path, live: int, tokens: int) -> list[Window]:
    """Serve a model repository and measure it."""
    with (
        _with_room_for(repository, live) as limited,
        launched_service(limited) as service,
        CaptionClient(service.grpc, timeout=_TIMEOUT_SECONDS) as client,
    ):
        return measure(service.triton_metrics, client, live, tokens)


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
    # Enough that decoding takes longer than encoding, so that captions wait for room.
    parser.add_argument("--tokens", type=int, default=40, help="tokens of each caption")
    parser.add_argument("--json", type=Path, help="file to write the windows to")
    arguments = parser.parse_args()
    windows = profile(arguments.model_repository, arguments.live, arguments.tokens)
    if not windows:
        raise SystemExit("captions never waited for room")
    Console().print(_table(windows, arguments.live))
    if arguments.json:
        values = [dataclasses.asdict(window) | {"ours": window.ours} for window in windows]
        arguments.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
