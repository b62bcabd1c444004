"""The figures of docs/scaling.md are those of the committed load tests, and follow from them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements" / "load"
PAGE = (ROOT / "docs" / "scaling.md").read_text()
PAGES = (PAGE, (ROOT / "docs" / "measurements" / "README.md").read_text())
_LINK = re.compile(r"\[(.*?)\]\(\S*load/([\w-]+)\.json\)")


def measured(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MEASUREMENTS / f"{name}.json").read_text())
    return found


def held(name: str) -> float:
    rate: float = measured(name)["knee"]["rate"]
    return rate


def table(first_cell: str) -> list[list[str]]:
    """The cells of the table whose head begins so, without the head."""
    lines = PAGE.splitlines()
    (begin,) = (number for number, line in enumerate(lines) if line.startswith(f"| {first_cell} |"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def file_of(cell: str) -> str:
    found = _LINK.fullmatch(cell)
    assert found is not None, cell
    return found[2]


@pytest.mark.parametrize("cells", table("load test"), ids=lambda cells: file_of(cells[0]))
def test_a_load_tests_figures_are_those_measured(cells: list[str]) -> None:
    found = measured(file_of(cells[0]))
    knee = found["knee"]
    assert knee["certain"]
    (row,) = (row for row in found["rows"] if row["rate"] == knee["rate"])
    cores_each = found["cores_each"] or found["machine"]["cores"]
    assert cells[1:] == [
        f"{found['replicas']} of {cores_each}",
        f"{knee['rate']:g}",
        f"{knee['missed']:g}",
        f"{row['p50_ms'] / 1e3:.2f}",
        f"{row['p99_ms'] / 1e3:.2f}",
    ]


@pytest.mark.parametrize("cells", table("two replicas"), ids=lambda cells: cells[0])
def test_a_prediction_is_of_the_measured_replica_of_one_core(cells: list[str]) -> None:
    model = {"demo": "demo", "full-size int8": "full-int8"}[cells[0]]
    predicted, both = 2 * held(f"{model}-1x1"), held(f"{model}-2x1")
    assert cells[1:] == [f"{predicted:g}", f"{both:g}", f"{100 * both / predicted:.0f} %"]


def test_replicas_follow_from_the_formula() -> None:
    cores, head_room, gib = 2, 0.3, 3
    each = held("full-int8") * (1 - head_room)
    wanted = [10, 1_000, 100_000]
    assert table("images/s wanted") == [
        [
            f"{rate:,}",
            f"{math.ceil(rate / each):,}",
            f"{math.ceil(rate / each) * cores:,}",
            f"{math.ceil(rate / each) * gib:,} GiB",
        ]
        for rate in wanted
    ]
    assert f"{held('full-int8'):g} x (1 - {head_room:g}) = {each:.2f}" in PAGE


@pytest.mark.parametrize("cells", table("from memory"), ids=lambda cells: cells[0])
def test_the_cache_is_worth_what_was_measured(cells: list[str]) -> None:
    share = float(cells[0].removesuffix(" %")) / 100
    name = {0.0: "demo", 0.5: "demo-cached-half", 1.0: "demo-cached"}[share]
    found = measured(name)
    assert found["cached_share"] == share
    expected = "-" if share == 1 else f"{held('demo') / (1 - share):g}"
    assert cells[1:] == [expected, f"{held(name):g}"]


def test_every_load_test_is_in_a_page_and_every_link_leads_to_one() -> None:
    linked = {name for page in PAGES for _, name in _LINK.findall(page)}
    assert linked == {path.stem for path in MEASUREMENTS.glob("*.json")}


@pytest.mark.parametrize("path", MEASUREMENTS.glob("*.json"), ids=lambda path: path.stem)
def test_load_tests_name_no_folder(path: Path) -> None:
    assert not re.search(r'"[^"]*(/tmp|/work|/home|/root)', path.read_text())
