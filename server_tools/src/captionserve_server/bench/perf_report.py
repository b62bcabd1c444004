"""What perf_analyzer wrote: its CSV and its printed report, as values and as a table.

The CSV has what the client saw. The captioner only accepts a request and answers it later, so what
Triton says of it is no measure of work; the report tells queue and compute of the graphs' models.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

_US_PER_MS = 1000.0
_LOADS = ("Concurrency", "Request Rate")
_COMPOSING = "Composing models:"
_MODEL = re.compile(r"^ *(\w+), version: \d+$", re.MULTILINE)


@dataclass(frozen=True)
class ModelTime:
    """What Triton says of one model during a measurement.

    Attributes:
        requests: images or steps that it did.
        executions: batches in which it did them.
        queue_ms: mean time that an execution waited for the model.
        compute_ms: mean time that it ran.
    """

    requests: int
    executions: int
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class Measurement:
    """One load on the service.

    Attributes:
        load: requests in flight, or requests a second, as the sweep says.
        images_per_second: captions answered.
        latency_ms: what callers waited, by percentile (50, 90, 95 and 99).
        models: the models that the captioner calls, by name.
    """

    load: float
    images_per_second: float
    latency_ms: Mapping[int, float]
    models: Mapping[str, ModelTime]


def parse_measurement(csv_text: str, report: str) -> Measurement:
    """Read what one run of one load left behind.

    Args:
        csv_text: the CSV, a header and one row.
        report: what was printed.

    Raises:
        ValueError: if the CSV is not such a file.
    """
    rows = list(csv.DictReader(csv_text.splitlines()))
    if len(rows) != 1:
        raise ValueError(f"perf_analyzer's CSV has {len(rows)} rows in place of one")
    (row,) = rows
    try:
        load = next(row[name] for name in _LOADS if name in row)
        percentiles = {rank: float(row[f"p{rank} latency"]) for rank in (50, 90, 95, 99)}
        rate = float(row["Inferences/Second"])
    except (KeyError, StopIteration) as error:
        raise ValueError(f"perf_analyzer's CSV lacks a column: {error}") from error
    return Measurement(
        load=float(load),
        images_per_second=rate,
        latency_ms={rank: value / _US_PER_MS for rank, value in percentiles.items()},
        models=parse_models(report),
    )


def parse_models(report: str) -> dict[str, ModelTime]:
    """The composing models of a printed report, by name; none where it has no such part."""
    _, _, composing = report.partition(_COMPOSING)
    # Name and text in turn, after what stands before the first name.
    parts = _MODEL.split(composing)[1:]
    return {
        name: ModelTime(
            requests=int(_number(text, r"Inference count: (\d+)")),
            executions=int(_number(text, r"Execution count: (\d+)")),
            queue_ms=_number(text, r"queue (\d+) usec") / _US_PER_MS,
            compute_ms=_number(text, r"compute infer (\d+) usec") / _US_PER_MS,
        )
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


def _number(text: str, pattern: str) -> float:
    """The number found, or 0: perf_analyzer leaves times out where nothing was executed."""
    found = re.search(pattern, text)
    return float(found[1]) if found else 0.0


def join_csv(parts: Sequence[str]) -> str:
    """The rows of several CSVs with the same header, below it."""
    header = parts[0].splitlines()[0]
    rows = [row for part in parts for row in part.splitlines()[1:] if row]
    return "\n".join([header, *rows]) + "\n"


def latency_table(load: str, measurements: Sequence[Measurement]) -> Table:
    """What callers saw, one row for each load."""
    percentiles = [f"p{rank}, ms" for rank in measurements[0].latency_ms]
    table = Table(load, "images/s", *percentiles)
    for one in measurements:
        latencies = [f"{value:.0f}" for value in one.latency_ms.values()]
        table.add_row(f"{one.load:g}", f"{one.images_per_second:.1f}", *latencies)
    return table


def model_table(load: str, measurements: Sequence[Measurement]) -> Table:
    """What Triton says of the models that the captioner calls, one row for each load."""
    models = list(dict.fromkeys(name for one in measurements for name in one.models))
    table = Table(load, *models, caption="queue + compute of an execution, ms (requests in it)")
    for one in measurements:
        table.add_row(f"{one.load:g}", *(_model_cell(one.models.get(name)) for name in models))
    return table


def _model_cell(model: ModelTime | None) -> str:
    if model is None or not model.executions:
        return ""
    batch = model.requests / model.executions
    return f"{model.queue_ms:.1f} + {model.compute_ms:.1f} ({batch:.1f})"
