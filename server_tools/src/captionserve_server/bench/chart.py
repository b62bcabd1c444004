"""The chart of a benchmark: throughput and latency against how many images are done at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from captionserve_server.bench.report import Report, Summary

_PANEL_INCHES = (5.5, 3.6)
_DOTS_PER_INCH = 110
# Of a decade; more would run into each other.
_TICKS = (1.0, 2.0, 5.0)

Colours = Mapping[str, str]
"""Matplotlib's colours by system, the same in every panel."""


def write_chart(report: Report, path: Path) -> None:
    """Write the chart of a report as a PNG file."""
    draw_chart(report).savefig(path, format="png", dpi=_DOTS_PER_INCH)


def draw_chart(report: Report) -> Figure:
    """Two panels for each number of beams, and a key to the systems."""
    summaries = report.summaries()
    num_beams = sorted({summary.row.num_beams for summary in summaries})
    colours = _colours(summaries)
    width, height = _PANEL_INCHES
    figure = Figure((2 * width, height * len(num_beams)), layout="constrained")
    panels = figure.subplots(len(num_beams), 2, squeeze=False)
    for (throughput, latency), beams in zip(panels, num_beams, strict=True):
        own = [summary for summary in summaries if summary.row.num_beams == beams]
        _throughput(throughput, own, colours, _beams_text(beams))
        _latency(latency, own, colours)
    keys = [
        Line2D([], [], color=colour, marker="o", label=peer) for peer, colour in colours.items()
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, fontsize="small")
    processor, cores = report.machine["processor"], report.machine["cores"]
    figure.suptitle(f"{report.settings.checkpoint} checkpoint, {processor}, {cores} cores")
    return figure


def _colours(summaries: Sequence[Summary]) -> Colours:
    return {peer: f"C{index}" for index, (peer, _) in enumerate(_by_peer(summaries))}


def _beams_text(beams: int) -> str:
    return "greedy" if beams == 1 else f"{beams} beams"


def _throughput(axes: Axes, summaries: Sequence[Summary], colours: Colours, title: str) -> None:
    for peer, own in _by_peer(summaries):
        middle = [each.images_per_second for each in own]
        below = [each.images_per_second - each.lowest for each in own]
        above = [each.highest - each.images_per_second for each in own]
        colour = colours[peer]
        axes.errorbar(_loads(own), middle, (below, above), color=colour, marker="o", capsize=3)
    _finish(axes, summaries, title, "images per second")


def _latency(axes: Axes, summaries: Sequence[Summary], colours: Colours) -> None:
    for peer, own in _by_peer(summaries):
        p50 = [each.latency_p50_ms / 1e3 for each in own]
        p99 = [each.latency_p99_ms / 1e3 for each in own]
        axes.plot(_loads(own), p50, color=colours[peer], marker="o")
        axes.plot(_loads(own), p99, color=colours[peer], marker=".", linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=_TICKS))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _finish(axes, summaries, "median, dotted: 99th percentile", "seconds per image")


def _finish(axes: Axes, summaries: Sequence[Summary], title: str, quantity: str) -> None:
    loads = sorted({summary.row.load for summary in summaries})
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [str(load) for load in loads])
    axes.set_xlabel("images at once (batch, live or in flight)")
    axes.set_ylabel(quantity)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)


def _by_peer(summaries: Sequence[Summary]) -> list[tuple[str, list[Summary]]]:
    names = dict.fromkeys(summary.row.peer for summary in summaries)
    return [(name, [each for each in summaries if each.row.peer == name]) for name in names]


def _loads(summaries: Sequence[Summary]) -> list[int]:
    return [summary.row.load for summary in summaries]
