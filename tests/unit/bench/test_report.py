"""Reports: medians, ratios, shares of the limit, JSON and the chart."""

from __future__ import annotations

import io
import json

import pytest
from captionserve_server.bench.chart import draw_chart
from captionserve_server.bench.cost_model import (
    MachineRates,
    images_per_second_at_most,
    stages_of,
)
from captionserve_server.bench.peers.system import Load
from captionserve_server.bench.report import Comparison, Figures, Report, without_folders
from captionserve_server.bench.rows import Row
from captionserve_server.export.precision import Precision
from rich.console import Console

from tests.unit.bench.test_cost_model import CONFIG

PEER = Row("peer", Precision.FP32, Load(8, "batch"), 4)
OURS = Row("ours", Precision.INT8, Load(16, "in flight"), 4)
OURS_GREEDY = Row("ours", Precision.INT8, Load(16, "in flight"), 1)
OTHER = Row("other", Precision.FP32, Load(1, "batch"), 4)
COMPARISON = Comparison(
    command="captionserve bench --checkpoint /home/me/tiny",
    checkpoint="/home/me/tiny",
    repositories={},
    patterns=(),
    references=("peer, batch 8", "ours, 16"),
    num_beams=(1, 4),
    rounds=3,
    images=10,
    forced_tokens=None,
)
RATES = [MachineRates(1e9, 3e9, 4e9), MachineRates(3e9, 1e9, 4e9), MachineRates(2e9, 2e9, 1e9)]


def figures(number: int, seconds: float, **stages_ms: float) -> Figures:
    return Figures(
        images_per_second=10 / seconds,
        latency_p50_ms=100 * seconds,
        latency_p99_ms=200 * seconds,
        tokens=6,
        same_captions=0.9,
        memory_mib=300 + number,
        stages_ms=stages_ms,
    )


def report() -> Report:
    return Report(
        comparison=COMPARISON,
        machine={"processor": "Some CPU", "cores": 2},
        config=CONFIG,
        rates=RATES,
        rounds={
            PEER: [figures(number, seconds) for number, seconds in enumerate((5.0, 4.0, 10.0))],
            OURS: [
                figures(number, seconds, encode=10 * seconds)
                for number, seconds in enumerate((1.0, 2.0, 1.25))
            ],
            OURS_GREEDY: [figures(0, 1.0, encode=1.0)],
            OTHER: [figures(0, 1.0)],
        },
        failures={"broken": "no weights in /home/me/tiny"},
    )


def test_medians_and_spread_are_of_the_rounds() -> None:
    peer, ours, *_ = report().summaries()
    assert (peer.medians.images_per_second, peer.lowest, peer.highest) == (2.0, 1.0, 2.5)
    assert (ours.medians.images_per_second, ours.lowest, ours.highest) == (8.0, 5.0, 10.0)
    assert (peer.medians.latency_p50_ms, peer.medians.latency_p99_ms) == (500, 1000)
    assert peer.medians.memory_mib == 301
    assert ours.medians.stages_ms == {"encode": 12.5}


def test_ratios_are_to_the_reference_with_as_many_beams() -> None:
    peer, ours, greedy, other = (summary.ratios for summary in report().summaries())
    assert peer == {"peer, batch 8": 1.0, "ours, 16": 0.25}
    assert ours == {"peer, batch 8": 4.0, "ours, 16": 1.0}
    assert other == {"peer, batch 8": 5.0, "ours, 16": 1.25}
    # The peer was not measured with one beam.
    assert greedy == {"ours, 16": 1.0}


def test_the_limit_is_that_of_the_rows_own_load_and_precision() -> None:
    peer, ours, *_ = report().summaries()
    rates = MachineRates(2e9, 2e9, 4e9)
    assert report().median_rates() == rates
    limit = images_per_second_at_most(stages_of(CONFIG, 16, 4, 6), rates, Precision.INT8)
    assert ours.share_of_limit == 8.0 / limit
    limit = images_per_second_at_most(stages_of(CONFIG, 8, 4, 6), rates, Precision.FP32)
    assert peer.share_of_limit == 2.0 / limit


def test_json_has_every_round_and_what_failed() -> None:
    values = json.loads(report().as_json())
    assert values["command"] == "captionserve bench --checkpoint tiny"
    assert values["machine"] == {"processor": "Some CPU", "cores": 2}
    assert [each["images_per_second"] for each in values["rounds"][PEER.label]] == [2.0, 2.5, 1.0]
    assert sum(map(len, values["rounds"].values())) == 8
    assert [rates["fp32_flops"] for rates in values["machine_rates_by_round"]] == [1e9, 3e9, 2e9]
    first, second, *_ = values["rows"]
    assert first["label"] == PEER.label
    # What README and tests/contract/test_readme_figures.py read.
    assert first["images_per_second"] == 2.0
    assert (first["latency_p50_ms"], first["latency_p99_ms"]) == (500, 1000)
    share = report().summaries()[0].share_of_limit
    assert first["share_of_limit"] == pytest.approx(share, rel=1e-5)
    assert second["ratios"]["peer, batch 8"] == 4.0
    assert values["failures"] == {"broken": "no weights in tiny"}
    assert "/home" not in json.dumps(values)


def test_tables_are_not_cut() -> None:
    console = Console(width=180, record=True, file=io.StringIO())
    console.print(report().as_tables())
    text = console.export_text()
    assert "…" not in text
    for expected in (
        PEER.label,
        OURS.label,
        "encode",
        "Some CPU, 2 cores",
        "broken: no weights in",
    ):
        assert expected in text
    assert "times peer," in text
    assert "2 GFLOP/s fp32, 2 int8, 4.0 GB/s read" in text


def test_the_charts_key_has_every_system_in_the_colour_of_all_its_panels() -> None:
    figure = draw_chart(report())
    figure.savefig(io.BytesIO(), format="png")
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
    ("text", "shown"),
    [
        ("bench --json docs/bench.json --checkpoint org/name", None),
        (
            "bench --checkpoint /home/me/model --rows 'bare*'",
            "bench --checkpoint model --rows 'bare*'",
        ),
        (
            "--repository int8=/home/me/int8/ --json=/b.json",
            "--repository int8=int8/ --json=b.json",
        ),
        ('File "/home/me/x/worker.py", line 3', 'File "worker.py", line 3'),
        ("no weights in /home/me/model: 3 images/s", "no weights in model: 3 images/s"),
    ],
)
def test_texts_name_no_folder_of_the_machine(text: str, shown: str | None) -> None:
    assert without_folders(text) == (shown or text)
