"""A load test's report: JSON, table, words and chart."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from captionserve_server.bench.load.chart import draw_chart
from captionserve_server.bench.load.figures import Bounds, Call, figures_of
from captionserve_server.bench.load.report import Plan, Report, Row
from rich.console import Console

PLAN = Plan(
    command="captionserve load --repository /home/me/int8 --json /tmp/load.json",
    repository=Path("/home/me/int8"),
    replicas=2,
    cores_each=1,
    rates=(),
    seconds=20.0,
    deadline_seconds=10.0,
    bounds=Bounds(1.0),
    connections=4,
    cached_share=0.0,
    images=16,
    options={"num_beams": 4},
    seed=0,
)


def row(rate: int, *, answered: float = 1.0, latency: float = 0.2, late: float = 0.0) -> Row:
    """A rate of which a share is answered, and the rest refused, after so many seconds."""
    calls = [
        Call(
            number / rate,
            number / rate + late,
            number / rate + latency,
            "OK" if number < answered * 20 * rate else "RESOURCE_EXHAUSTED",
        )
        for number in range(20 * rate)
    ]
    return Row(figures_of(rate, calls, begin=0.0, end=20.0), 0.25, 1.5, 0.125, [400.0, 410.0])


def report(*rows: Row) -> Report:
    return Report(
        PLAN,
        machine={"processor": "Some CPU", "cores": 2},
        model={"version": 1, "precision": "int8", "image_size": (224, 224)},
        lone_ms=100.0 / 3,
        rows=list(rows),
    )


KNEE = report(row(10), row(40, answered=0.5), row(20, latency=0.4))


def test_json_has_all_rates_in_order_and_the_knee() -> None:
    text = KNEE.as_json()
    values = json.loads(text)
    assert "/home" not in text
    assert "/tmp" not in text
    assert values["command"] == "captionserve load --repository int8 --json load.json"
    assert values["lone_ms"] == 33.3333
    assert values["knee"] == {"rate": 20, "missed": 40, "certain": True}
    assert [each["rate"] for each in values["rows"]] == [10, 20, 40]
    assert [each["verdict"] for each in values["rows"]] == ["held", "held", "missed"]
    assert [each["p99_ms"] for each in values["rows"]] == [200, 400, 200]
    assert [each["refused_per_second"] for each in values["rows"]] == [0, 0, 20]
    assert values["rows"][0]["memory_mib"] == [400, 410]
    assert values["rows"][0]["service_cores"] == 1.5
    assert values["rows"][0]["other_cores"] == 0.125


def test_words_say_what_is_known_of_the_knee() -> None:
    assert "20 images/s were held and 40 were not" in KNEE.in_words()
    assert "10 images/s were held, and maybe more" in report(row(10)).in_words()
    assert "no rate was held" in report(row(10, latency=2.0)).in_words()
    late = report(row(10), row(20, latency=2.0, late=0.5)).in_words()
    assert "at 20 the generator was late itself" in late


def test_a_table_is_not_cut() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(KNEE.as_tables())
    text = console.export_text()
    assert "…" not in text
    assert "held" in text
    assert "missed" in text


def test_a_chart_has_each_latency_and_the_knee() -> None:
    figure = draw_chart(report(*KNEE.rows, row(80, latency=2.0, late=0.5)))
    figure.savefig(io.BytesIO(), format="png")
    latency, throughput = figure.axes
    lines = {str(line.get_label()): line for line in latency.get_lines()}
    assert [*lines] == ["p50", "p95", "p99", "p99 that is allowed", "knee"]
    assert np.array_equal(lines["p99"].get_xdata(), [10, 20, 40, 80])
    assert np.allclose(lines["p99"].get_ydata(), [0.2, 0.4, 0.2, 2.0])
    assert np.array_equal(lines["knee"].get_xdata(), [20, 20])
    assert [each.get_label() for each in throughput.collections] == ["generator late"]


def test_a_chart_of_no_answers_is_drawn() -> None:
    nothing = replace(row(10, answered=0.0), memory_mib=[])
    draw_chart(report(nothing)).savefig(io.BytesIO(), format="png")
