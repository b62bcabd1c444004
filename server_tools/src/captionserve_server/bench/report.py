"""What a benchmark found: as JSON with every raw value, and as tables of medians."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from captionserve_server.bench.cost_model import (
    WEIGHT_BYTES,
    MachineRates,
    images_per_second_at_most,
    stages_of,
)
from captionserve_server.bench.rounds import Measurements
from captionserve_server.bench.rows import Row
from captionserve_server.export.precision import Precision

_WHOLE_NUMBERS = ("latency_p50_ms", "latency_p99_ms", "memory_mib")
_FIGURES = ("images_per_second", "tokens", "same_captions", *_WHOLE_NUMBERS)
# The folders of an absolute path, up to its last name.
_FOLDERS = re.compile(r"(?<![\w.~/])/(?:[^\s/:'\"]+/)*")


@dataclass(frozen=True)
class Comparison:
    """What to compare, and how.

    Attributes:
        command: the command line, for others to read.
        name: what the checkpoint is called.
        checkpoint: a local folder or a hub id.
        repositories: exported model repositories by precision.
        precisions: what to export the checkpoint in beside those.
        patterns: shell patterns, of which one must match a row's label or its beginning.
        references: beginnings of labels of rows with which all others are compared.
        num_beams: the numbers of beams.
        rounds: how often every row runs.
        images: images of a run at least.
        forced_tokens: length of every caption; None for natural lengths.
    """

    command: str
    name: str
    checkpoint: str
    repositories: Mapping[str, Path]
    precisions: Sequence[Precision]
    patterns: Sequence[str]
    references: Sequence[str]
    num_beams: Sequence[int]
    rounds: int
    images: int
    forced_tokens: int | None


@dataclass(frozen=True)
class Summary:
    """A row's medians over the rounds.

    Attributes:
        row: the row.
        medians: of every figure of a Sample, by its name.
        lowest: of the rounds' images a second.
        highest: likewise.
        stages_ms: medians of the milliseconds per image by stage.
        limit: what the machine could do at most, images a second; None where unknown.
        ratios: images a second over those of each reference with as many beams, by the reference.
    """

    row: Row
    medians: Mapping[str, float]
    lowest: float
    highest: float
    stages_ms: dict[str, float]
    limit: float | None
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        """Throughput."""
        return self.medians["images_per_second"]

    @property
    def share_of_limit(self) -> float | None:
        """Throughput over the machine's limit."""
        return None if self.limit is None else self.images_per_second / self.limit

    def as_json(self) -> dict[str, Any]:
        """All of it, the medians beside the rest."""
        values: dict[str, Any] = {"label": self.row.label, **dataclasses.asdict(self)}
        return {**values, **values.pop("medians"), "share_of_limit": self.share_of_limit}


@dataclass
class Report:
    """A whole benchmark.

    Attributes:
        comparison: what was asked for.
        machine: facts about the machine.
        config: the checkpoint's, transformers' VisionEncoderDecoderConfig.
        rows: what was to be measured, in order.
        versions: of what each system is made of, by its name.
        rates: what the machine did, measured in each round.
        measurements: what was measured.
    """

    comparison: Comparison
    machine: dict[str, object]
    config: Any
    rows: list[Row] = field(default_factory=list)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    rates: list[MachineRates] = field(default_factory=list)
    measurements: Measurements = field(default_factory=Measurements)

    def median_rates(self) -> MachineRates:
        """The medians of what the machine did."""
        by_round = [dataclasses.astuple(rates) for rates in self.rates]
        return MachineRates(*(statistics.median(each) for each in zip(*by_round, strict=True)))

    def summaries(self) -> list[Summary]:
        """A summary of each row that has samples, in the rows' order."""
        measured = {sample.row for sample in self.measurements.samples}
        summaries = [self._summary(row) for row in self.rows if row.label in measured]
        for reference in self.comparison.references:
            for other in summaries:
                if other.row.label.startswith(reference):
                    for each in summaries:
                        if each.row.num_beams == other.row.num_beams:
                            ratio = each.images_per_second / other.images_per_second
                            # The first row of that beginning is the reference.
                            each.ratios.setdefault(reference, ratio)
        return summaries

    def _summary(self, row: Row) -> Summary:
        samples = [each for each in self.measurements.samples if each.row == row.label]

        throughputs = [sample.images_per_second for sample in samples]
        medians = {
            name: statistics.median(getattr(sample, name) for sample in samples)
            for name in _FIGURES
        }
        stages_ms = {
            stage: statistics.median(sample.stages_ms[stage] for sample in samples)
            for stage in samples[0].stages_ms
        }
        limit = None
        if row.precision in WEIGHT_BYTES:
            stages = stages_of(self.config, row.load.at_once, row.num_beams, medians["tokens"])
            limit = images_per_second_at_most(stages, self.median_rates(), row.precision)
        return Summary(row, medians, min(throughputs), max(throughputs), stages_ms, limit)

    def as_json(self) -> str:
        """Everything as one JSON document, which names no folder of this machine."""
        failures = self.measurements.failures.items()
        values = {
            "command": self.comparison.command,
            "checkpoint": self.comparison.name,
            "rounds": self.comparison.rounds,
            "images": self.comparison.images,
            "forced_tokens": self.comparison.forced_tokens,
            "machine": self.machine,
            "versions": self.versions,
            "machine_rates_by_round": [dataclasses.asdict(rates) for rates in self.rates],
            "rows": [summary.as_json() for summary in self.summaries()],
            "samples": [dataclasses.asdict(sample) for sample in self.measurements.samples],
            "failures": {name: without_folders(reason) for name, reason in failures},
        }
        return json.dumps(_rounded(values), indent=2) + "\n"

    def as_tables(self) -> RenderableType:
        """Tables for a person."""
        parts: list[RenderableType] = []
        if summaries := self.summaries():
            rates = self.median_rates()
            parts += [
                self._rows_table(summaries),
                *_stages_tables(summaries),
                Text(
                    f"{self.machine['processor']}, {self.machine['cores']} cores: "
                    f"{rates.fp32_flops / 1e9:.0f} GFLOP/s fp32, "
                    f"{rates.int8_flops / 1e9:.0f} int8, {rates.bytes / 1e9:.1f} GB/s read "
                    "(medians over the rounds)"
                ),
            ]
        for name, reason in self.measurements.failures.items():
            parts.append(Text(f"not measured to the end: {name}: {reason}"))
        return Group(*parts)

    def _rows_table(self, summaries: Sequence[Summary]) -> Table:
        asked = self.comparison
        tokens = asked.forced_tokens
        length = "natural lengths" if tokens is None else f"{tokens} tokens each"
        table = _table(
            *("row", "images/s", "lowest", "highest", "p50, ms", "p99, ms"),
            *("MiB", "of limit", "same captions"),
            *("times " + reference.replace(", ", ",\n") for reference in asked.references),
            title=f"{asked.name}, {length}, medians of {asked.rounds} rounds",
        )
        for each in summaries:
            limit = each.share_of_limit
            ratios = (each.ratios.get(reference) for reference in asked.references)
            table.add_row(
                each.row.label,
                *(f"{value:.3g}" for value in (each.images_per_second, each.lowest, each.highest)),
                *(f"{each.medians[name]:.0f}" for name in _WHOLE_NUMBERS),
                "-" if limit is None else f"{100 * limit:.0f} %",
                f"{100 * each.medians['same_captions']:.0f} %",
                *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )
        return table


def without_folders(text: str) -> str:
    """The text with the last name of each absolute path in its place, to be shown to others."""
    return _FOLDERS.sub("", text)


def _rounded(value: Any) -> Any:
    """The same with six significant digits, which is more than was measured."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value


def _stages_tables(summaries: Sequence[Summary]) -> list[Table]:
    """One table of the rows that tell of stages, if there are any."""
    telling = [summary for summary in summaries if summary.stages_ms]
    if not telling:
        return []
    stages = list(dict.fromkeys(stage for summary in telling for stage in summary.stages_ms))
    table = _table("row", *stages, "all", title="milliseconds per image by stage")
    for summary in telling:
        cells = [summary.stages_ms.get(stage) for stage in stages]
        cells.append(1e3 / summary.images_per_second)
        shown = ("-" if cell is None else f"{cell:.1f}" for cell in cells)
        table.add_row(summary.row.label, *shown)
    return [table]


def _table(*names: str, title: str) -> Table:
    """Numbers to the right, and nothing cut: a report is read in files as well."""
    table = Table(title=title)
    for name in names:
        table.add_column(name, no_wrap=True, justify="right" if table.columns else "left")
    return table
