"""What a benchmark found: as JSON with every raw value, and as tables of medians."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from captionserve_server.bench.cost_model import (
    MachineRates,
    images_per_second_at_most,
    stages_of,
)
from captionserve_server.bench.rows import Row
from captionserve_server.export.precision import Precision

# The folders of an absolute path, up to its last name.
_FOLDERS = re.compile(r"(?<![\w.~/])/(?:[^\s/:'\"]+/)*(?=[^\s/])")


@dataclass(frozen=True)
class Comparison:
    """What to compare, and how: `captionserve bench` says of each of its options what it means.

    In repositories, None stands for a precision that is to be exported.
    """

    command: str
    checkpoint: str
    repositories: Mapping[Precision, Path | None]
    patterns: Sequence[str]
    references: Sequence[str]
    num_beams: Sequence[int]
    rounds: int
    images: int
    forced_tokens: int | None

    @property
    def title(self) -> str:
        """The checkpoint, for others to read."""
        return without_folders(self.checkpoint)


@dataclass(frozen=True)
class Figures:
    """What one run of a row shows, or the medians of several.

    Attributes:
        images_per_second: throughput.
        latency_p50_ms: median time of an image.
        latency_p99_ms: 99th percentile.
        tokens: generated tokens per image, mean.
        same_captions: share of images captioned token for token as by the first row with as many
            beams.
        memory_mib: memory of the system's processes afterwards, as if there were no others.
        stages_ms: milliseconds per image by stage, where the system tells.
    """

    images_per_second: float
    latency_p50_ms: float
    latency_p99_ms: float
    tokens: float
    same_captions: float
    memory_mib: float
    stages_ms: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """A row over the rounds.

    Attributes:
        row: the row.
        medians: the median of each figure.
        lowest: of the rounds' images a second.
        highest: likewise.
        share_of_limit: throughput over what the machine could do at most.
        ratios: images a second over those of each reference with as many beams, by the reference.
    """

    row: Row
    medians: Figures
    lowest: float
    highest: float
    share_of_limit: float
    ratios: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """All of it, the medians beside the rest."""
        values = {"label": self.row.label, **asdict(self)}
        return {**values, **values.pop("medians")}


@dataclass
class Report:
    """A whole benchmark, of which more and more is there.

    Attributes:
        comparison: what was asked for.
        machine: facts about it; see machine_facts.
        config: the checkpoint's, transformers' VisionEncoderDecoderConfig.
        rates: what the machine did, measured in each round.
        rounds: the figures of each round by row; of a system that failed, fewer or none.
        failures: why a system could not be measured to the end, by its name.
    """

    comparison: Comparison
    machine: dict[str, object]
    config: Any
    rates: list[MachineRates] = field(default_factory=list)
    rounds: dict[Row, list[Figures]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median_rates(self) -> MachineRates:
        """The medians of what the machine did."""
        return MachineRates(**_medians([asdict(rates) for rates in self.rates]))

    def summaries(self) -> list[Summary]:
        """A summary of each row that was measured, in the order of the first round."""
        medians = {
            row: Figures(**_medians([asdict(each) for each in figures]))
            for row, figures in self.rounds.items()
        }
        return [self._summary(row, medians) for row in medians]

    def _summary(self, row: Row, medians: Mapping[Row, Figures]) -> Summary:
        own = medians[row]
        throughputs = [figures.images_per_second for figures in self.rounds[row]]
        stages = stages_of(self.config, row.load.at_once, row.num_beams, own.tokens)
        limit = images_per_second_at_most(stages, self.median_rates(), row.precision)
        ratios: dict[str, float] = {}
        for reference in self.comparison.references:
            for other, theirs in medians.items():
                if other.num_beams == row.num_beams and other.label.startswith(reference):
                    # The first row of that beginning is the reference.
                    ratios.setdefault(reference, own.images_per_second / theirs.images_per_second)
        share = own.images_per_second / limit
        return Summary(row, own, min(throughputs), max(throughputs), share, ratios)

    def as_json(self) -> str:
        """Everything as one JSON document, which names no folder of this machine."""
        values = {
            "command": without_folders(self.comparison.command),
            "checkpoint": self.comparison.title,
            "images": self.comparison.images,
            "forced_tokens": self.comparison.forced_tokens,
            "machine": self.machine,
            "machine_rates_by_round": [asdict(rates) for rates in self.rates],
            "rows": [summary.as_json() for summary in self.summaries()],
            "rounds": {
                row.label: [asdict(each) for each in figures]
                for row, figures in self.rounds.items()
            },
            "failures": {name: without_folders(why) for name, why in self.failures.items()},
        }
        # Six significant digits are more than was measured.
        short = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.6g}"))
        return json.dumps(short, indent=2) + "\n"

    def as_tables(self) -> RenderableType:
        """Tables for a person."""
        parts: list[RenderableType] = []
        if summaries := self.summaries():
            parts.append(self._rows_table(summaries))
            if telling := [each for each in summaries if each.medians.stages_ms]:
                parts.append(_stages_table(telling))
            rates, machine = self.median_rates(), self.machine
            parts.append(
                f"{machine['processor']}, {machine['cores']} cores: "
                f"{rates.fp32_flops / 1e9:.0f} GFLOP/s fp32, {rates.int8_flops / 1e9:.0f} int8, "
                f"{rates.bytes / 1e9:.1f} GB/s read (medians over the rounds)"
            )
        for name, reason in self.failures.items():
            parts.append(Text(f"not measured to the end: {name}: {reason}"))
        return Group(*parts)

    def _rows_table(self, summaries: Sequence[Summary]) -> Table:
        asked = self.comparison
        length = f"{asked.forced_tokens} tokens each" if asked.forced_tokens else "natural lengths"
        table = _table(
            *("row", "images/s", "lowest", "highest", "p50, ms", "p99, ms"),
            *("MiB", "of limit", "same captions"),
            *("times " + reference.replace(", ", ",\n") for reference in asked.references),
            title=f"{asked.title}, {length}, medians of {asked.rounds} rounds",
        )
        for each in summaries:
            median = each.medians
            ratios = (each.ratios.get(reference) for reference in asked.references)
            table.add_row(
                each.row.label,
                *(f"{rate:.3g}" for rate in (median.images_per_second, each.lowest, each.highest)),
                *(f"{median.latency_p50_ms:.0f}", f"{median.latency_p99_ms:.0f}"),
                *(f"{median.memory_mib:.0f}", f"{100 * each.share_of_limit:.0f} %"),
                f"{100 * median.same_captions:.0f} %",
                *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )
        return table


def without_folders(text: str) -> str:
    """The text with the last name of each absolute path in its place, to be shown to others."""
    return _FOLDERS.sub("", text)


def _medians(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each number by its key, those of dictionaries within included."""
    medians = {}
    for key, first in values[0].items():
        middle = _medians if isinstance(first, dict) else statistics.median
        medians[key] = middle([each[key] for each in values])
    return medians


def _stages_table(summaries: Sequence[Summary]) -> Table:
    """The rows that tell of stages."""
    stages = list(dict.fromkeys(stage for each in summaries for stage in each.medians.stages_ms))
    table = _table("row", *stages, "all", title="milliseconds per image by stage")
    for each in summaries:
        cells = [each.medians.stages_ms.get(stage) for stage in stages]
        cells.append(1e3 / each.medians.images_per_second)
        table.add_row(each.row.label, *("-" if cell is None else f"{cell:.1f}" for cell in cells))
    return table


def _table(*names: str, title: str) -> Table:
    """Numbers to the right, and nothing cut: a report is read in files as well."""
    table = Table(title=title)
    for name in names:
        table.add_column(name, no_wrap=True, justify="right" if table.columns else "left")
    return table
