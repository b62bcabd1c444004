"""What a load test found: as JSON, and as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from captionserve_server.bench.load.figures import Bounds, Figures, Verdict
from captionserve_server.bench.load.knee import Knee, knee_of
from captionserve_server.bench.report import without_folders

# Of the time at a rate, until the service has filled; its calls are made and not counted.
LEAD_IN_SHARE = 0.1


@dataclass(frozen=True)
class Plan:
    """What to ask, and how: `captionserve load` says of each of its options what it means.

    `repository` is None where a running service is asked.
    """

    command: str
    repository: Path | None
    replicas: int
    cores_each: int | None
    rates: tuple[float, ...]
    seconds: float
    deadline_seconds: float
    bounds: Bounds
    connections: int
    cached_share: float
    images: int
    options: dict[str, int]
    seed: int
    most_other_cores: float | None = None

    @property
    def lead_in_seconds(self) -> float:
        """Seconds at each rate whose calls are not counted."""
        return LEAD_IN_SHARE * self.seconds


@dataclass(frozen=True)
class Row:
    """A rate.

    Attributes:
        figures: of its calls.
        generator_cores: processor time of the generator, in cores.
        service_cores: likewise of the services that were started for it; else None.
        other_cores: likewise of all else on the machine, which was not to be had then; a little
            below 0 where that was nothing, for these are differences of coarse counts.
        memory_mib: what each of the services took afterwards, as if it were alone.
    """

    figures: Figures
    generator_cores: float
    service_cores: float | None
    other_cores: float | None
    memory_mib: list[float]


@dataclass
class Report:
    """A whole load test, of which more and more is there.

    Attributes:
        plan: what was asked for.
        machine: facts about the one that it ran on; see machine_facts.
        model: version, precision and image size of what was served.
        lone_ms: median time of a call when there is no other.
        rows: the rates, as they were offered.
    """

    plan: Plan
    machine: dict[str, object]
    model: dict[str, object]
    lone_ms: float
    rows: list[Row] = field(default_factory=list)

    def verdict(self, row: Row) -> Verdict:
        """Whether a rate was held."""
        return row.figures.verdict(self.plan.bounds)

    @property
    def knee(self) -> Knee:
        """What is known of the knee."""
        return knee_of((row.figures.rate, self.verdict(row)) for row in self.rows)

    @property
    def sorted_rows(self) -> list[Row]:
        """The rates from the lowest to the highest."""
        return sorted(self.rows, key=lambda row: row.figures.rate)

    def as_json(self) -> str:
        """Everything as one JSON document, which names no folder of this machine."""
        plan = self.plan
        values: dict[str, Any] = {
            "command": without_folders(plan.command),
            "replicas": plan.replicas,
            "cores_each": plan.cores_each,
            "seconds_each_rate": plan.seconds,
            "of_which_not_counted": plan.lead_in_seconds,
            "deadline_seconds": plan.deadline_seconds,
            "connections": plan.connections,
            "cached_share": plan.cached_share,
            "images": plan.images,
            "options": plan.options,
            "seed": plan.seed,
            "most_other_cores": plan.most_other_cores,
            "bounds": asdict(plan.bounds),
            "machine": self.machine,
            "model": self.model,
            "lone_ms": self.lone_ms,
            "knee": asdict(self.knee),
            "rows": [
                {
                    **asdict(row.figures),
                    "verdict": self.verdict(row).value,
                    "generator_cores": row.generator_cores,
                    "service_cores": row.service_cores,
                    "other_cores": row.other_cores,
                    "memory_mib": row.memory_mib,
                }
                for row in self.sorted_rows
            ],
        }
        # Six significant digits are more than was measured.
        short = json.loads(json.dumps(values), parse_float=lambda text: float(f"{float(text):.6g}"))
        return json.dumps(short, indent=2) + "\n"

    def as_tables(self) -> RenderableType:
        """A table for a person, and the knee in words."""
        plan = self.plan
        names = (
            *("offered/s", "calls", "answered/s", "refused/s", "other/s"),
            *("p50, ms", "p95, ms", "p99, ms", "refused, ms", "sent late, p99"),
            *("service, cores", "others, cores", ""),
        )
        table = Table(title=f"open loop, {plan.seconds:g} s at each rate, Poisson arrivals")
        for name in names:
            table.add_column(name, no_wrap=True, justify="right")
        for row in self.sorted_rows:
            each = row.figures
            other = each.due_per_second - each.answered_per_second - each.refused_per_second
            table.add_row(
                *(f"{each.rate:g}", str(each.calls)),
                *(f"{each.answered_per_second:.3g}", f"{each.refused_per_second:.3g}"),
                # What is left of a difference of equal numbers is none, of whatever sign.
                f"{abs(round(other, 6)):.3g}",
                *map(_milliseconds, (each.p50_ms, each.p95_ms, each.p99_ms, each.refused_p50_ms)),
                _milliseconds(each.late_p99_ms),
                *map(_cores, (row.service_cores, row.other_cores)),
                self.verdict(row).value,
            )
        return Group(table, self.in_words())

    def in_words(self) -> str:
        """The knee in a sentence."""
        knee, bounds = self.knee, self.plan.bounds
        held = (
            f"at least {100 * bounds.answered_share:g} % answered and a 99th percentile of "
            f"{bounds.p99_seconds:g} s at most"
        )
        if knee.rate is None:
            found = f"no rate was held, with {held}"
        elif knee.missed is None:
            found = f"{knee.rate:g} images/s were held, and maybe more, with {held}"
        else:
            found = f"{knee.rate:g} images/s were held and {knee.missed:g} were not, with {held}"
        if knee.missed is not None and not knee.certain:
            found += f"; at {knee.missed:g} the generator was late itself, so that may be its own"
        return found


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _cores(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
