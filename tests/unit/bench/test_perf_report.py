"""perf_analyzer's CSV and report, as a real run of 16 requests in flight left them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from captionserve_server.bench.perf_report import (
    join_csv,
    latency_table,
    model_table,
    parse_measurement,
    parse_models,
)
from rich.console import Console

CSV = (Path(__file__).parent / "in_flight_16.csv").read_text()
REPORT = (Path(__file__).parent / "in_flight_16.txt").read_text()
# Of vision_encoder.
QUEUE_MS, COMPUTE_MS = 0.268, 9.061


def test_a_measurement_is_read_from_both() -> None:
    measured = parse_measurement(CSV, REPORT)
    assert measured.load == 16
    assert measured.images_per_second == 45.2886
    assert measured.latency_ms == {50: 343.548, 90: 443.221, 95: 471.899, 99: 518.833}
    assert list(measured.models) == ["decoder_step", "preprocess", "vision_encoder"]
    encoder = measured.models["vision_encoder"]
    assert encoder.requests > encoder.executions > 0
    assert (encoder.queue_ms, encoder.compute_ms) == (QUEUE_MS, COMPUTE_MS)


def test_a_rate_is_a_load_too() -> None:
    rate = CSV.replace("Concurrency,", "Request Rate,").replace("\n16,", "\n12.5,")
    assert parse_measurement(rate, REPORT).load == 12.5


def test_a_report_without_other_models_has_none() -> None:
    assert parse_models(REPORT.partition("Composing models:")[0]) == {}


def test_a_model_that_did_nothing_took_no_time() -> None:
    idle = "Composing models: \n  preprocess, version: 1\n      Inference count: 0\n"
    model = parse_models(idle)["preprocess"]
    assert (model.requests, model.executions, model.queue_ms, model.compute_ms) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "text",
    ["", CSV.splitlines()[0], CSV + CSV.splitlines()[1], CSV.replace("p95 latency", "p95")],
    ids=["empty", "no row", "two rows", "no percentile"],
)
def test_another_csv_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="CSV"):
        parse_measurement(text, REPORT)


def test_joined_csvs_have_one_header() -> None:
    header, row = CSV.splitlines()
    assert join_csv([CSV, CSV]).splitlines() == [header, row, row]


def test_tables_show_what_was_measured() -> None:
    console = Console(file=io.StringIO(), width=100, record=True)
    measured = [parse_measurement(CSV, REPORT)]
    console.print(latency_table("in flight", measured))
    console.print(model_table("in flight", measured))
    text = console.export_text()
    assert "in flight" in text
    assert all(cell in text for cell in ("45.3", "344", "443", "472", "519"))
    assert f"{QUEUE_MS:.1f} + {COMPUTE_MS:.1f}" in text
