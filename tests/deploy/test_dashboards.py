"""The dashboards ask a Prometheus that is provisioned for metrics that a gateway exports."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.exported import exported_metrics
from tests.deploy.promql import unknown_in
from tests.deploy.tools import ROOT, run, said

GRAFANA = ROOT / "docker" / "observability" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
# What Grafana puts in for a range that fits the panel.
_RANGE = "$__rate_interval"

Dashboard = dict[str, Any]


def loaded(path: Path) -> Dashboard:
    dashboard: Dashboard = json.loads(path.read_text())
    return dashboard


def wrong(dashboard: Dashboard) -> Iterator[str]:
    """What a dashboard asks for that is not there, and panels that show nothing or overlap."""
    sources = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yaml").read_text())
    known = {(each["type"], each["uid"]) for each in sources["datasources"]}
    numbers = [panel["id"] for panel in dashboard["panels"]]
    if len(set(numbers)) != len(numbers):
        yield "two panels have one number"
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        where = panel["title"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        if cells & taken or max(x for x, _ in cells) >= 24:
            yield f"{where}: lies on another, or outside"
        taken |= cells
        if not panel["targets"]:
            yield f"{where}: asks for nothing"
        for source in (panel["datasource"], *(each["datasource"] for each in panel["targets"])):
            if (source["type"], source["uid"]) not in known:
                yield f"{where}: asks {source}"
        for query in queries(panel):
            for what in unknown_in(query, exported_metrics()):
                yield f"{where}: {what}"


def queries(panel: dict[str, Any]) -> Iterator[str]:
    """A panel's queries, as Prometheus is asked them."""
    for target in panel["targets"]:
        yield target["expr"].replace(_RANGE, "5m")


def test_there_are_dashboards() -> None:
    assert DASHBOARDS


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_nothing_is_wrong(path: Path) -> None:
    assert list(wrong(loaded(path))) == []


def metric(name: str) -> Callable[[Dashboard], object]:
    return lambda dashboard: dashboard["panels"][0]["targets"][0].update(expr=name)


@pytest.mark.parametrize(
    "mistake",
    [
        metric("sum(captionserve_ready)"),
        metric('rate(captionserve_requests_total{verb="x"}[5m])'),
        metric("1"),
        lambda dashboard: dashboard["panels"][0].update(targets=[]),
        lambda dashboard: dashboard["panels"][0]["datasource"].update(uid="other"),
        lambda dashboard: dashboard["panels"][1].update(id=dashboard["panels"][0]["id"]),
        lambda dashboard: dashboard["panels"][1]["gridPos"].update(x=0, y=0),
    ],
)
def test_a_mistake_is_found(mistake: Callable[[Dashboard], object]) -> None:
    dashboard = copy.deepcopy(loaded(DASHBOARDS[0]))
    mistake(dashboard)
    assert list(wrong(dashboard)) != []


def test_promtool_reads_every_query(tmp_path: Path) -> None:
    found = [
        query for path in DASHBOARDS for panel in loaded(path)["panels"] for query in queries(panel)
    ]
    assert promtool(found, tmp_path) == ""
    assert promtool([*found, "sum(captionserve_serving"], tmp_path) != ""


def promtool(found: list[str], folder: Path) -> str:
    """What promtool has against queries."""
    path = folder / "queries.yaml"
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(found)]
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    ended = run("promtool", "check", "rules", path)
    return "" if ended.returncode == 0 else said(ended)
