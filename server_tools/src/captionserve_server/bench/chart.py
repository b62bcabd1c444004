"""The chart of a benchmark: throughput and latency against how many images are done at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from captionserve_server.bench.report import Report, Summary

_PANEL_INCHES = (5.5, 3.6)
_DOTS_PER_INCH = 110


def write_chart(report: Report, path: Path) -> None:
    """Write a PNG with two panels for each number of beams.

    Args:
        report: what was measured.
        path: the file to write.
    """
    summaries = report.summaries()
    num_beams = sorted({summary.row.num_beams for summary in summaries})
    width, height = _PANEL_INCHES
    figure = Figure((2 * width, height * len(num_beams)), layout="constrained")
    panels = figure.subplots(len(num_beams), 2, squeeze=False)
    for (throughput, latency), beams in zip(panels, num_beams, strict=True):
        own = [summary for summary in summaries if summary.row.num_beams == beams]
        _throughput(throughput, own, _beams_text(beams))
        _latency(latency, own)
    panels[0][0].legend(fontsize="small")
    processor, cores = report.machine["processor"], report.machine["cores"]
    figure.suptitle(f"{report.settings.checkpoint} checkpoint, {processor}, {cores} cores")
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH)


def _beams_text(beams: int) -> str:
    return "greedy" if beams == 1 else f"{beams} beams"


def _throughput(axes: Axes, summaries: Sequence[Summary], title: str) -> None:
    for peer, own in _by_peer(summaries):
        middle = [each.images_per_second for each in own]
        below = [each.images_per_second - each.lowest for each in own]
        above = [each.highest - each.images_per_second for each in own]
        axes.errorbar(_loads(own), middle, (below, above), marker="o", capsize=3, label=peer)
    _finish(axes, summaries, title, "images per second")


def _latency(axes: Axes, summaries: Sequence[Summary]) -> None:
    for _, own in _by_peer(summaries):
        (line,) = axes.plot(_loads(own), [each.latency_p50_ms / 1e3 for each in own], marker="o")
        p99 = [each.latency_p99_ms / 1e3 for each in own]
        axes.plot(_loads(own), p99, linestyle=":", marker=".", color=line.get_color())
    axes.set_yscale("log")
    for formatted in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatted("{x:g}")
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
