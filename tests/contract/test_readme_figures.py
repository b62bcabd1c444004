"""The README's figures of speed are those of the committed measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "docs" / "measurements" / "bench-full.json"
BEAMS = ", 4 beams"


def figures() -> dict[str, dict[str, float]]:
    """The benchmark's rows by label."""
    rows = json.loads(BENCHMARK.read_text())["rows"]
    return {row["label"].removesuffix(BEAMS): row for row in rows if row["label"].endswith(BEAMS)}


FIGURES = figures()


def table_rows(columns: int) -> list[list[str]]:
    """The cells of the rows of the table with so many columns in the chapter on speed."""
    readme = (ROOT / "README.md").read_text()
    chapter = readme.split("## Speed\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in chapter.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in lines if len(cells) == columns][1:]


@pytest.mark.parametrize("cells", table_rows(5), ids=lambda cells: cells[0])
def test_a_systems_figures_are_those_measured(cells: list[str]) -> None:
    row = FIGURES[cells[0]]
    assert cells[1:] == [
        f"{row['images_per_second']:.2f}",
        f"{row['latency_p50_ms'] / 1e3:.1f}",
        f"{row['latency_p99_ms'] / 1e3:.1f}",
        f"{100 * row['share_of_limit']:.0f} %",
    ]


@pytest.mark.parametrize("cells", table_rows(4), ids=lambda cells: f"{cells[0]}, {cells[1]}")
def test_a_ratio_is_of_two_figures_of_one_run(cells: list[str]) -> None:
    load, peer, *ratios = cells
    for precision, ratio in zip(("fp32", "int8"), ratios, strict=True):
        ours = FIGURES[f"captionserve {precision}, {load}"]["images_per_second"]
        assert ratio == f"{ours / FIGURES[peer]['images_per_second']:.1f}"
