"""The chart of a load test: latency, and what was answered and refused, over the offered rate."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from captionserve_server.bench.load.figures import Figures, Verdict
from captionserve_server.bench.load.report import Report

_PANEL_INCHES = (5.5, 3.8)
# Of a decade; more would run into each other.
_TICKS = (1.0, 2.0, 5.0)
_LATENCIES: tuple[tuple[str, Callable[[Figures], float | None]], ...] = (
    ("p50", lambda figures: figures.p50_ms),
    ("p95", lambda figures: figures.p95_ms),
    ("p99", lambda figures: figures.p99_ms),
)


def draw_chart(report: Report) -> Figure:
    """Two panels; a line stands at the knee, a cross where it was the generator that was late."""
    width, height = _PANEL_INCHES
    figure = Figure((2 * width, height), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    _draw_latency(report, latency)
    _draw_throughput(report, throughput)
    for axes in (latency, throughput):
        axes.set_xlabel("images per second offered")
        axes.set_xlim(0, None)
        axes.grid(alpha=0.3)
        if report.knee.rate is not None:
            axes.axvline(report.knee.rate, color="black", linestyle="--", linewidth=1, label="knee")
        axes.legend(fontsize="small")
    replicas, machine = report.plan.replicas, report.machine
    figure.suptitle(
        f"{report.model['precision']}, "
        + (f"{replicas} replicas, " if replicas > 1 else "")
        + f"{machine['processor']}, {machine['cores']} cores"
    )
    return figure


def _draw_latency(report: Report, axes: Axes) -> None:
    rows = [row.figures for row in report.sorted_rows]
    for name, of in _LATENCIES:
        points = [(each.rate, value / 1e3) for each in rows if (value := of(each)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(
        report.plan.bounds.p99_seconds, color="grey", linestyle=":", label="p99 that is allowed"
    )
    axes.set(title="latency of answers, from when a call was due", ylabel="seconds")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=_TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_throughput(report: Report, axes: Axes) -> None:
    rows = [row.figures for row in report.sorted_rows]
    rates = [each.rate for each in rows]
    answered = [each.answered_per_second for each in rows]
    axes.plot([0.0, *rates], [0.0, *rates], color="grey", linestyle=":", label="all")
    axes.plot(rates, answered, marker="o", label="answered")
    axes.plot(rates, [each.refused_per_second for each in rows], marker="s", label="refused")
    late = [row.figures for row in report.rows if report.verdict(row) is Verdict.GENERATOR_LATE]
    if late:
        axes.scatter(
            [each.rate for each in late],
            [each.answered_per_second for each in late],
            marker="x",
            color="red",
            zorder=3,
            label="generator late",
        )
    axes.set(title="what became of the calls", ylabel="a second", ylim=(0, None))
