"""The rates in docs/scaling.md are those of the committed load tests."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGE = (DOCS / "scaling.md").read_text()
ROWS = re.findall(
    r"\| ([\d.]+) \(\[[\w-]+\]\((measurements/load/[\w-]+\.json)\)\) \| ([\d.]+) \|", PAGE
)


def knee(path: str) -> tuple[float, float]:
    """The rate that was held, and the next one, which was not."""
    found = json.loads((DOCS / path).read_text())["knee"]
    assert found["certain"]
    return found["rate"], found["missed"]


def test_every_load_test_is_in_the_table() -> None:
    there = {f"measurements/load/{path.name}" for path in DOCS.glob("measurements/load/*.json")}
    assert {path for _, path, _ in ROWS} == there


@pytest.mark.parametrize(("held", "path", "missed"), ROWS)
def test_a_rate_is_as_it_was_measured(held: str, path: str, missed: str) -> None:
    assert (float(held), float(missed)) == knee(path)


def test_the_prediction_follows_from_one_replica() -> None:
    one, _ = knee("measurements/load/demo-1x1.json")
    two, _ = knee("measurements/load/demo-2x1.json")
    assert f"{2 * one:.1f}: they held {two:.0f}, {two / (2 * one):.0%}".replace("%", " %") in PAGE


def test_what_the_cache_was_to_bring_follows_from_a_service_without() -> None:
    none, _ = knee("measurements/load/amx-full-int8.json")
    most, _ = knee("measurements/load/amx-full-int8-cached.json")
    said = f"10 times as much, {10 * none:.1f}, and held {most}:\n  {most / (10 * none):.0%}"
    assert said.replace("%", " %") in PAGE
