"""What a benchmark found: as JSON with every raw value, and as tables of medians."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from captionserve_server.bench.cost_model import (
    WEIGHT_BYTES,
    Load,
    MachineRates,
    ModelShape,
    images_per_second_at_most,
)
from captionserve_server.bench.rounds import Measurements, Sample
from captionserve_server.bench.rows import Row

_MISSING = "-"
# The folders of an absolute path, up to its last name.
_FOLDERS = re.compile(r"(?<![\w.~/])/(?:[^\s/:'\"]+/)*")


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        command: the command line, without folders.
        checkpoint: what the checkpoint is called.
        rounds: how often every row ran.
        images: images that a run captioned at least.
        forced_tokens: length of every caption; None for natural lengths.
        reference: beginning of the label of the row that others are compared with.
    """

    command: str
    checkpoint: str
    rounds: int
    images: int
    forced_tokens: int | None
    reference: str


@dataclass(frozen=True)
class Summary:
    """A row's medians over the rounds.

    Attributes:
        row: the row.
        images_per_second: throughput; `lowest` and `highest` are of all rounds.
        ratio: throughput over that of the reference with as many beams; None without one.
        limit: what the machine could do at most, images a second; None where unknown.
        stages_ms: milliseconds per image by stage.
    """

    row: Row
    images_per_second: float
    lowest: float
    highest: float
    latency_p50_ms: float
    latency_p99_ms: float
    tokens: float
    same_captions: float
    memory_mib: float
    peak_rss_mib: float
    cpu_seconds_per_image: float
    ratio: float | None
    limit: float | None
    stages_ms: dict[str, float]

    @property
    def share_of_limit(self) -> float | None:
        """Throughput over the machine's limit."""
        return None if self.limit is None else self.images_per_second / self.limit


@dataclass(frozen=True)
class Report:
    """A whole benchmark.

    Attributes:
        settings: what was asked for.
        machine: facts about the machine.
        versions: of what each system is made of, by its name.
        shape: the model's.
        rates: what the machine did, measured in each round.
        rows: what was to be measured, in order.
        measurements: what was measured.
    """

    settings: Settings
    machine: dict[str, object]
    versions: dict[str, dict[str, str]]
    shape: ModelShape
    rates: list[MachineRates]
    rows: list[Row]
    measurements: Measurements

    def summaries(self) -> list[Summary]:
        """A summary of each row that has samples, in the rows' order."""
        summaries = [
            self._summary(row, samples) for row in self.rows if (samples := self._samples(row))
        ]
        references = {
            each.row.num_beams: each.images_per_second
            for each in reversed(summaries)
            if each.row.label.startswith(f"{self.settings.reference},")
        }
        return [_with_ratio(each, references.get(each.row.num_beams)) for each in summaries]

    def median_rates(self) -> MachineRates:
        """The medians of what the machine did."""
        return MachineRates(
            *(
                statistics.median(getattr(rates, each.name) for rates in self.rates)
                for each in dataclasses.fields(MachineRates)
            )
        )

    def _samples(self, row: Row) -> list[Sample]:
        return [sample for sample in self.measurements.samples if sample.row == row.label]

    def _summary(self, row: Row, samples: Sequence[Sample]) -> Summary:
        throughputs = [sample.images_per_second for sample in samples]
        tokens = statistics.median(sample.tokens for sample in samples)
        stages = samples[0].stages_ms
        return Summary(
            row=row,
            images_per_second=statistics.median(throughputs),
            lowest=min(throughputs),
            highest=max(throughputs),
            latency_p50_ms=statistics.median(sample.latency_p50_ms for sample in samples),
            latency_p99_ms=statistics.median(sample.latency_p99_ms for sample in samples),
            tokens=tokens,
            same_captions=statistics.median(sample.same_captions for sample in samples),
            memory_mib=statistics.median(sample.memory_mib for sample in samples),
            peak_rss_mib=max(sample.peak_rss_mib for sample in samples),
            cpu_seconds_per_image=statistics.median(
                sample.cpu_seconds / sample.images for sample in samples
            ),
            ratio=None,
            limit=self._limit(row, tokens),
            stages_ms={
                stage: statistics.median(sample.stages_ms[stage] for sample in samples)
                for stage in stages
            },
        )

    def _limit(self, row: Row, tokens: float) -> float | None:
        if row.precision not in WEIGHT_BYTES:
            return None
        load = Load(row.load, row.num_beams, tokens)
        return images_per_second_at_most(self.shape, load, self.median_rates(), row.precision)

    def as_json(self) -> str:
        """Everything as one JSON document."""
        values: dict[str, Any] = {
            **dataclasses.asdict(self.settings),
            "machine": self.machine,
            "versions": self.versions,
            "model": dataclasses.asdict(self.shape),
            "machine_rates_by_round": [dataclasses.asdict(rates) for rates in self.rates],
            "rows": [_summary_as_json(summary) for summary in self.summaries()],
            "samples": [
                dataclasses.asdict(sample) | {"images_per_second": sample.images_per_second}
                for sample in self.measurements.samples
            ],
            "failures": {
                name: without_folders(reason) for name, reason in self.measurements.failures.items()
            },
        }
        return json.dumps(_rounded(values), indent=2) + "\n"

    def as_tables(self) -> RenderableType:
        """Tables for a person."""
        summaries = self.summaries()
        parts: list[RenderableType] = [_rows_table(summaries, self.settings)]
        if any(summary.stages_ms for summary in summaries):
            parts.append(_stages_table(summaries))
        parts.append(Text(self._machine_line()))
        parts.append(Text(self._idle_line()))
        for name, reason in self.measurements.failures.items():
            parts.append(Text(f"not measured to the end: {name}: {reason}"))
        return Group(*parts)

    def _machine_line(self) -> str:
        rates = self.median_rates()
        return (
            f"{self.machine['processor']}, {self.machine['cores']} cores: "
            f"{rates.fp32_flops / 1e9:.0f} GFLOP/s fp32, {rates.int8_flops / 1e9:.0f} int8, "
            f"{rates.bytes / 1e9:.1f} GB/s read (medians over the rounds)"
        )

    def _idle_line(self) -> str:
        """How far the systems that were not measured were in the way."""
        most = max(
            (sample.others_cpu_seconds / sample.seconds for sample in self.measurements.samples),
            default=0.0,
        )
        return f"systems that were not being measured used at most {100 * most:.1f} % of a core"


def without_folders(text: str) -> str:
    """The text with the last name of each absolute path in its place, to be shown to others."""
    return _FOLDERS.sub("", text)


def _with_ratio(summary: Summary, reference: float | None) -> Summary:
    ratio = None if reference is None else summary.images_per_second / reference
    return dataclasses.replace(summary, ratio=ratio)


def _summary_as_json(summary: Summary) -> dict[str, Any]:
    values = dataclasses.asdict(summary) | {"share_of_limit": summary.share_of_limit}
    return {"label": summary.row.label} | values


def _rounded(value: Any) -> Any:
    """The same with six significant digits, which is more than was measured."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value


def _rows_table(summaries: Sequence[Summary], settings: Settings) -> Table:
    length = "natural lengths"
    if settings.forced_tokens is not None:
        length = f"{settings.forced_tokens} tokens each"
    table = Table(
        *("row", "images/s", "lowest", "highest", "ratio"),
        *("p50, ms", "p99, ms", "MiB", "of limit", "same captions"),
        title=f"{settings.checkpoint}, {length}, medians of {settings.rounds} rounds; "
        f"ratio to {settings.reference}",
    )
    _align(table)
    for summary in summaries:
        table.add_row(
            summary.row.label,
            *(f"{value:.3g}" for value in _throughputs(summary)),
            _MISSING if summary.ratio is None else f"{summary.ratio:.2f}",
            f"{summary.latency_p50_ms:.0f}",
            f"{summary.latency_p99_ms:.0f}",
            f"{summary.memory_mib:.0f}",
            _MISSING if summary.share_of_limit is None else f"{100 * summary.share_of_limit:.0f} %",
            f"{100 * summary.same_captions:.0f} %",
        )
    return table


def _align(table: Table) -> None:
    """Numbers to the right, and nothing cut: a report is read in files as well."""
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"


def _throughputs(summary: Summary) -> tuple[float, float, float]:
    return summary.images_per_second, summary.lowest, summary.highest


def _stages_table(summaries: Sequence[Summary]) -> Table:
    telling = [summary for summary in summaries if summary.stages_ms]
    stages = list(telling[0].stages_ms)
    table = Table("row", *stages, title="milliseconds per image by stage")
    _align(table)
    for summary in telling:
        table.add_row(summary.row.label, *(f"{summary.stages_ms[stage]:.1f}" for stage in stages))
    return table
