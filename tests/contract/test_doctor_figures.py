"""What `captionserve doctor` says to expect is what committed benchmarks measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from captionserve_server.serving.doctor import (
    DEMO_GIBIBYTES,
    LEAST_SHARED_MEBIBYTES,
    MEASURED,
    MEASURED_CORES,
    SHARED_MEBIBYTES,
    Measured,
)
from captionserve_server.settings import Settings

ROOT = Path(__file__).parents[2]
MEASUREMENTS = ROOT / "docs" / "measurements"


def row(page: str, label: str) -> dict[str, float]:
    rows = json.loads((MEASUREMENTS / page).read_text())["rows"]
    (found,) = (each for each in rows if each["label"] == label)
    return dict(found)


@pytest.mark.parametrize("measured", MEASURED, ids=lambda measured: measured.page)
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_figures_are_those_of_the_benchmark(measured: Measured, precision: str) -> None:
    machine = json.loads((MEASUREMENTS / measured.page).read_text())["machine"]
    assert machine["instructions"][-1] == measured.instructions
    assert machine["cores"] == MEASURED_CORES
    found = row(measured.page, f"captionserve {precision}, 16 in flight, 4 beams")
    assert measured.images_per_second[precision] == round(found["images_per_second"], 1)
    assert measured.gibibytes[precision] == round(found["memory_mib"] / 1024, 1)


def test_the_demo_takes_what_it_took() -> None:
    found = row("bench-demo.json", "captionserve fp32, 16 in flight, 4 beams")
    assert round(found["memory_mib"] / 1024, 1) == DEMO_GIBIBYTES


def test_shared_memory_is_the_sum_in_the_documentation() -> None:
    page = (ROOT / "docs" / "deploying.md").read_text()
    said = re.search(r"(\d+) MiB  \+  (\d+) x --max-message-megabytes  \+  (\d+) MiB x slots", page)
    assert said
    least, messages, each_slot = map(int, said.groups())
    config = (ROOT / "model_repository" / "decoder" / "config.pbtxt").read_text()
    slots = re.search(r'key: "slots" value \{ string_value: "(\d+)"', config)
    assert slots
    megabytes = Settings.model_fields["max_message_megabytes"].default
    assert least == LEAST_SHARED_MEBIBYTES
    assert least + messages * megabytes + each_slot * int(slots[1]) == SHARED_MEBIBYTES
