"""Reports: medians, ratios, shares of the limit, JSON and the chart."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from captionserve_server.bench.chart import draw_chart, write_chart
from captionserve_server.bench.cost_model import (
    MachineRates,
    images_per_second_at_most,
    stages_of,
)
from captionserve_server.bench.report import Comparison, Report, without_folders
from captionserve_server.bench.rounds import Measurements, Sample
from captionserve_server.bench.rows import Load, Row
from captionserve_server.cli.bench import shown_command
from PIL import Image
from rich.console import Console

from tests.unit.bench.test_cost_model import CONFIG

PEER = Row("peer", "fp32", Load(8, "batch"), 4)
OURS = Row("ours", "int8", Load(16, "in flight"), 4)
OURS_GREEDY = Row("ours", "int8", Load(16, "in flight"), 1)
UNKNOWN = Row("other", "bf16", Load(1, "batch"), 4)
COMPARISON = Comparison(
    command="captionserve bench",
    name="tiny",
    checkpoint="/home/me/tiny",
    repositories={},
    precisions=(),
    patterns=(),
    references=("peer, batch 8", "ours, 16"),
    num_beams=(1, 4),
    rounds=3,
    images=10,
    forced_tokens=None,
)
RATES = [MachineRates(1e9, 3e9, 4e9), MachineRates(3e9, 1e9, 4e9), MachineRates(2e9, 2e9, 1e9)]


def sample(row: Row, number: int, seconds: float, **stages_ms: float) -> Sample:
    return Sample(
        row=row.label,
        round=number,
        images_per_second=10 / seconds,
        latency_p50_ms=100 * seconds,
        latency_p99_ms=200 * seconds,
        tokens=6,
        same_captions=0.9,
        memory_mib=300 + number,
        stages_ms=stages_ms,
    )


def report() -> Report:
    samples = [sample(PEER, number, seconds) for number, seconds in enumerate((5.0, 4.0, 10.0))]
    samples += [
        sample(OURS, number, seconds, encode=10 * seconds)
        for number, seconds in enumerate((1.0, 2.0, 1.25))
    ]
    samples += [sample(OURS_GREEDY, 0, 1.0, encode=1.0), sample(UNKNOWN, 0, 1.0)]
    return Report(
        comparison=COMPARISON,
        machine={"processor": "Some CPU", "cores": 2},
        config=CONFIG,
        rows=[PEER, OURS, OURS_GREEDY, UNKNOWN, Row("broken", "fp32", Load(1, "batch"), 4)],
        versions={"ours": {"numpy": "1"}},
        rates=RATES,
        measurements=Measurements(samples, {"broken": "it broke"}),
    )


def test_medians_and_spread_are_of_the_rounds() -> None:
    peer, ours, *_ = report().summaries()
    assert (peer.images_per_second, peer.lowest, peer.highest) == (2.0, 1.0, 2.5)
    assert (ours.images_per_second, ours.lowest, ours.highest) == (8.0, 5.0, 10.0)
    assert (peer.medians["latency_p50_ms"], peer.medians["latency_p99_ms"]) == (500, 1000)
    assert peer.medians["memory_mib"] == 301
    assert ours.stages_ms == {"encode": 12.5}


def test_ratios_are_to_the_reference_with_as_many_beams() -> None:
    peer, ours, greedy, unknown = (summary.ratios for summary in report().summaries())
    assert peer == {"peer, batch 8": 1.0, "ours, 16": 0.25}
    assert ours == {"peer, batch 8": 4.0, "ours, 16": 1.0}
    assert unknown == {"peer, batch 8": 5.0, "ours, 16": 1.25}
    # The peer was not measured with one beam.
    assert greedy == {"ours, 16": 1.0}


def test_the_limit_is_that_of_the_rows_own_load_and_precision() -> None:
    peer, ours, _, unknown = report().summaries()
    rates = MachineRates(2e9, 2e9, 4e9)
    assert report().median_rates() == rates
    limit = images_per_second_at_most(stages_of(CONFIG, 16, 4, 6), rates, "int8")
    assert ours.limit == limit
    assert ours.share_of_limit == 8.0 / limit
    assert peer.limit == images_per_second_at_most(stages_of(CONFIG, 8, 4, 6), rates, "fp32")
    assert unknown.limit is None
    assert unknown.share_of_limit is None


def test_json_has_every_round_and_what_failed() -> None:
    values = json.loads(report().as_json())
    assert values["command"] == "captionserve bench"
    assert values["machine"] == {"processor": "Some CPU", "cores": 2}
    assert len(values["samples"]) == 8
    assert values["samples"][0]["images_per_second"] == 2.0
    assert [rates["fp32_flops"] for rates in values["machine_rates_by_round"]] == [1e9, 3e9, 2e9]
    first, second, *_ = values["rows"]
    assert first["label"] == PEER.label
    # What README and tests/contract/test_readme_figures.py read.
    assert first["images_per_second"] == 2.0
    assert (first["latency_p50_ms"], first["latency_p99_ms"]) == (500, 1000)
    assert first["share_of_limit"] == pytest.approx(2.0 / first["limit"], rel=1e-5)
    assert second["ratios"]["peer, batch 8"] == 4.0
    assert values["failures"] == {"broken": "it broke"}


def test_tables_are_not_cut() -> None:
    console = Console(width=180, record=True, file=io.StringIO())
    console.print(report().as_tables())
    text = console.export_text()
    assert "…" not in text
    for expected in (PEER.label, OURS.label, "encode", "Some CPU, 2 cores", "broken: it broke"):
        assert expected in text
    assert "times peer," in text
    assert "2 GFLOP/s fp32, 2 int8, 4.0 GB/s read" in text


def test_the_chart_is_a_picture_with_two_panels_for_each_number_of_beams(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    write_chart(report(), path)
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > picture.height > 600
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 10


def test_the_charts_key_has_every_system_in_the_colour_of_all_its_panels() -> None:
    figure = draw_chart(report())
    (key,) = figure.legends
    colours = {
        text.get_text(): line.get_color()
        for text, line in zip(key.get_texts(), key.get_lines(), strict=True)
    }
    assert list(colours) == ["peer", "ours", "other"]
    greedy, latency_greedy, throughput, latency = figure.axes
    for panel in (greedy, latency_greedy):
        assert {line.get_color() for line in panel.get_lines()} == {colours["ours"]}
    for panel in (throughput, latency):
        assert {line.get_color() for line in panel.get_lines()} == set(colours.values())


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["bench", "--rows", "bare*"], "captionserve bench --rows 'bare*'"),
        (
            ["bench", "--checkpoint", "/home/me/model", "--json", "docs/bench.json"],
            "captionserve bench --checkpoint model --json docs/bench.json",
        ),
        (
            ["bench", "--repository", "int8=/home/me/int8", "--json=/home/me/b.json"],
            "captionserve bench --repository int8=int8 --json=b.json",
        ),
    ],
)
def test_the_command_names_no_folder_of_the_machine(arguments: list[str], shown: str) -> None:
    assert shown_command(arguments) == shown


def test_reasons_name_no_folder_of_the_machine() -> None:
    reason = 'File "/home/me/x/worker.py", line 3: no weights in /home/me/model: 3 images/s'
    assert without_folders(reason) == 'File "worker.py", line 3: no weights in model: 3 images/s'
    assert without_folders("docs/bench.json and org/name") == "docs/bench.json and org/name"
