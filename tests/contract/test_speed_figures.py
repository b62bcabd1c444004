"""The figures of speed in docs/speed.md and README are those of the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements"
BEAMS = ", 4 beams"


def figures(benchmark: str) -> dict[str, dict[str, float]]:
    """The rows of a benchmark by label."""
    rows = json.loads((MEASUREMENTS / benchmark).read_text())["rows"]
    return {row["label"].removesuffix(BEAMS): row for row in rows if row["label"].endswith(BEAMS)}


AVX2 = figures("bench-full.json")
AMX = figures("bench-full-amx.json")
RATIO_COLUMNS = (("fp32", AVX2), ("int8", AVX2), ("fp32", AMX), ("int8", AMX))


def table_rows(page: str, columns: int) -> list[list[str]]:
    """The cells of the rows of the table with so many columns in a page."""
    text = (ROOT / page).read_text()
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in lines if len(cells) == columns][1:]


@pytest.mark.parametrize("cells", table_rows("docs/speed.md", 5), ids=lambda cells: cells[0])
def test_a_systems_figures_are_those_measured(cells: list[str]) -> None:
    row = AVX2[cells[0]]
    assert cells[1:] == [
        f"{row['images_per_second']:.2f}",
        f"{row['latency_p50_ms'] / 1e3:.1f}",
        f"{row['latency_p99_ms'] / 1e3:.1f}",
        f"{100 * row['share_of_limit']:.0f} %",
    ]


@pytest.mark.parametrize(
    "cells",
    table_rows("docs/speed.md", 2 + len(RATIO_COLUMNS)),
    ids=lambda cells: f"{cells[0]}, {cells[1]}",
)
def test_a_ratio_is_of_two_figures_of_one_run(cells: list[str]) -> None:
    load, peer, *ratios = cells
    for (precision, measured), ratio in zip(RATIO_COLUMNS, ratios, strict=True):
        ours = measured[f"captionserve {precision}, {load}"]["images_per_second"]
        assert ratio == f"{ours / measured[peer]['images_per_second']:.1f}"


@pytest.mark.parametrize("cells", table_rows("README.md", 4), ids=lambda cells: cells[0])
def test_the_readmes_figures_are_those_measured(cells: list[str]) -> None:
    label, own, *ratios = cells
    name, peer = label.split("; than ")
    ours = [measured[f"captionserve {name}"]["images_per_second"] for measured in (AVX2, AMX)]
    assert own == f"{ours[0]:.2f}"
    assert ratios == [
        f"{each / measured[peer]['images_per_second']:.1f}"
        for each, measured in zip(ours, (AVX2, AMX), strict=True)
    ]
