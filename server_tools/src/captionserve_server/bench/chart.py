"""The chart of a benchmark: throughput and latency against how many images are done at once."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from captionserve_server.bench.report import Report, Summary
from captionserve_server.bench.rows import beams_text

_PANEL_INCHES = (5.5, 3.6)
# Of a decade; more would run into each other.
_TICKS = (1.0, 2.0, 5.0)


def draw_chart(report: Report) -> Figure:
    """Two panels for each number of beams, and a key to the systems."""
    # A load that is streamed in part stands at no place of its own on the axis.
    summaries = [each for each in report.summaries() if not each.row.load.streams]
    num_beams = sorted({summary.row.num_beams for summary in summaries})
    # A system has the same of matplotlib's colours in every panel.
    peers = dict.fromkeys(summary.row.peer for summary in summaries)
    colours = {peer: f"C{index}" for index, peer in enumerate(peers)}
    width, height = _PANEL_INCHES
    figure = Figure((2 * width, height * len(num_beams)), layout="constrained")
    panels = figure.subplots(len(num_beams), 2, squeeze=False)
    for (throughput, latency), beams in zip(panels, num_beams, strict=True):
        of_beams = [each for each in summaries if each.row.num_beams == beams]
        for peer, colour in colours.items():
            own = [each for each in of_beams if each.row.peer == peer]
            if own:
                _draw(throughput, latency, own, colour)
        loads = sorted({each.row.load.at_once for each in of_beams})
        for axes in (throughput, latency):
            axes.set_xscale("log", base=2)
            axes.set_xticks(loads, [str(load) for load in loads])
            axes.set_xlabel("images at once (in a batch or in flight)")
            axes.grid(alpha=0.3)
        throughput.set(title=beams_text(beams), ylabel="images per second", ylim=(0, None))
        latency.set(title="median, dotted: 99th percentile", ylabel="seconds per image")
        latency.set_yscale("log")
        latency.yaxis.set_major_locator(LogLocator(subs=_TICKS))
        latency.yaxis.set_major_formatter("{x:g}")
        latency.yaxis.set_minor_formatter(NullFormatter())
    keys = [
        Line2D([], [], color=colour, marker="o", label=peer) for peer, colour in colours.items()
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, fontsize="small")
    processor, cores = report.machine["processor"], report.machine["cores"]
    figure.suptitle(f"{report.comparison.title}, {processor}, {cores} cores")
    return figure


def _draw(throughput: Axes, latency: Axes, own: Sequence[Summary], colour: str) -> None:
    """One system's lines in the two panels of a number of beams."""
    loads = [each.row.load.at_once for each in own]
    middle = [each.medians.images_per_second for each in own]
    below = [each.medians.images_per_second - each.lowest for each in own]
    above = [each.highest - each.medians.images_per_second for each in own]
    throughput.errorbar(loads, middle, (below, above), color=colour, marker="o", capsize=3)
    p50 = [each.medians.latency_p50_ms / 1e3 for each in own]
    latency.plot(loads, p50, color=colour, marker="o")
    p99 = [each.medians.latency_p99_ms / 1e3 for each in own]
    latency.plot(loads, p99, color=colour, marker=".", linestyle=":")
