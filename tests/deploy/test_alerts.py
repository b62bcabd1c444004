"""Alerts and the autoscaler's rule: they ask for what there is, fire when they should, and lead on.

promtool says whether they are queries, and runs the situations in alerts_test.yaml.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.checks.scaling import adapter_query, adapter_rules, unknown_to_gateway
from tests.deploy.exported import exported_metrics
from tests.deploy.promql import unknown_in
from tests.deploy.rendered import rendered
from tests.deploy.tools import ROOT, run, said

OBSERVABILITY = ROOT / "docker" / "observability"
RUNBOOK = ROOT / "docs" / "runbook.md"
SEVERITIES = {"warning", "critical"}

Alert = dict[str, Any]
File = dict[str, Any]


def loaded(name: str) -> File:
    file: File = yaml.safe_load((OBSERVABILITY / name).read_text())
    return file


def alerts(file: File) -> list[Alert]:
    return [rule for group in file["groups"] for rule in group["rules"]]


ALERTS = alerts(loaded("alerts.yaml"))
NAMES = [alert["alert"] for alert in ALERTS]


def sections(runbook: str) -> list[str]:
    return re.findall(r"^## (Captionserve\w*)$", runbook, re.MULTILINE)


def not_led_on(found: list[Alert], runbook: str) -> Iterator[str]:
    """What is missing between alerts and the runbook, which has a section for each, in order."""
    names = [alert["alert"] for alert in found]
    if names != sections(runbook):
        yield f"the sections are {sections(runbook)}"
    for alert in found:
        said = alert.get("annotations", {})
        if said.get("runbook_url") != f"docs/runbook.md#{alert['alert'].lower()}":
            yield f"{alert['alert']} leads to {said.get('runbook_url')}"
        if not said.get("summary"):
            yield f"{alert['alert']} does not say what is wrong"
        if alert.get("labels", {}).get("severity") not in SEVERITIES:
            yield f"{alert['alert']} has no severity"
    for section in re.split(r"^## ", runbook, flags=re.MULTILINE)[1:]:
        if len(section.split()) < 25:
            yield f"{section.split()[0]} says too little"


def test_each_alert_has_its_section() -> None:
    assert list(not_led_on(ALERTS, RUNBOOK.read_text())) == []


@pytest.mark.parametrize(
    "mistake",
    [
        lambda found: found.pop(),
        lambda found: found[0].update(alert="CaptionserveGone"),
        lambda found: found[0]["annotations"].update(runbook_url="docs/runbook.md"),
        lambda found: found[0]["annotations"].pop("summary"),
        lambda found: found[0]["labels"].update(severity="page"),
    ],
)
def test_an_alert_that_leads_nowhere_is_found(mistake: Callable[[list[Alert]], object]) -> None:
    found = copy.deepcopy(ALERTS)
    mistake(found)
    assert list(not_led_on(found, RUNBOOK.read_text())) != []


def test_a_section_without_an_alert_is_found() -> None:
    assert list(not_led_on(ALERTS, RUNBOOK.read_text() + "\n## CaptionserveElse\n")) != []


@pytest.mark.parametrize("alert", ALERTS, ids=NAMES)
def test_an_alert_asks_for_what_there_is(alert: Alert) -> None:
    assert list(unknown_in(alert["expr"], exported_metrics())) == []


@pytest.mark.parametrize("rule", adapter_rules(), ids=lambda rule: rule["name"]["as"])
def test_the_autoscaler_goes_by_what_there_is(rule: dict[str, Any]) -> None:
    assert list(unknown_to_gateway(rule)) == []


@pytest.mark.parametrize(
    "mistake",
    [
        lambda rule: rule.update(seriesQuery="captionserve_places"),
        lambda rule: rule.update(metricsQuery="sum(captionserve_queue) by (<<.GroupBy>>)"),
        lambda rule: rule["name"].update(matches="^captionserve_turn$"),
    ],
)
def test_a_rule_for_a_metric_that_is_not_there_is_found(
    mistake: Callable[[dict[str, Any]], object],
) -> None:
    rule = copy.deepcopy(adapter_rules()[0])
    mistake(rule)
    assert list(unknown_to_gateway(rule)) != []


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("captionserve_serving_now == 0", "no metric captionserve_serving_now"),
        ('rate(captionserve_requests_total{status="OK"}[5m])', "no label status"),
        ('rate(captionserve_requests_total{code="OVERLOADED"}[5m])', "no code is OVERLOADED"),
        ('rate(captionserve_requests_total{code=~"OK|FAILED"}[5m])', "no code is FAILED"),
        ('rate(captionserve_requests_total{method="CaptionAll"}[5m])', "no method is CaptionAll"),
        ("sum by (stage) (captionserve_working)", "grouped by stage"),
        ("rate(captionserve_request_seconds_total[5m])", "no metric captionserve_request_sec"),
    ],
)
def test_a_query_for_what_is_not_there_is_found(query: str, what: str) -> None:
    assert any(what in each for each in unknown_in(query, exported_metrics()))


def test_kubernetes_has_the_same_alerts() -> None:
    (rule,) = rendered("cpu").of("PrometheusRule")
    assert rule["spec"] == loaded("alerts.yaml")


def test_an_alert_that_was_not_written_for_kubernetes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("generate", OBSERVABILITY / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.main(["--check"]) == 0
    changed = tmp_path / "alerts.yaml"
    changed.write_text(generate.ALERTS.read_text().replace("for: 2m", "for: 3m", 1))
    monkeypatch.setattr(generate, "ALERTS", changed)
    monkeypatch.setattr(sys, "stderr", (tmp_path / "said").open("w"))
    assert generate.main(["--check"]) == 1


def test_promtool_finds_nothing(tmp_path: Path) -> None:
    ended = run("promtool", "check", "config", OBSERVABILITY / "prometheus.yaml")
    assert ended.returncode == 0, said(ended)
    assert f"{len(ALERTS)} rules found" in ended.stdout
    # The adapter's queries are templates: what they become is checked as a rule.
    rules = [{"record": "a:b", "expr": adapter_query(rule)} for rule in adapter_rules()]
    assert checked({"groups": [{"name": "adapter", "rules": rules}]}, tmp_path) == 0


def test_promtool_finds_a_mistake(tmp_path: Path) -> None:
    file = loaded("alerts.yaml")
    alerts(file)[0]["expr"] = "up{job=captionserve} == 0"
    assert checked(file, tmp_path) != 0


def checked(file: File, folder: Path) -> int:
    """How promtool's look at rules ends."""
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(file))
    return run("promtool", "check", "rules", path).returncode


def fires() -> dict[str, set[bool]]:
    """Each alert of the situations, and whether there is one with it and one without."""
    found: dict[str, set[bool]] = {}
    for situation in loaded("alerts_test.yaml")["tests"]:
        for each in situation["alert_rule_test"]:
            found.setdefault(each["alertname"], set()).add(bool(each["exp_alerts"]))
    return found


def test_each_alert_has_a_situation_with_it_and_one_without() -> None:
    assert fires() == {name: {True, False} for name in NAMES}


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    assert misfiring(loaded("alerts.yaml"), tmp_path) == set()


# Ways in which alerts fire too seldom, and too often.
SPOILT: dict[str, Callable[[Alert], object]] = {
    "never": lambda alert: alert.update(expr=f"({alert['expr']}) and on () vector(0) > 1"),
    "hours late": lambda alert: alert.update({"for": "9h"}),
    "always": lambda alert: alert.update(expr="vector(1)"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_an_alert_that_fires_otherwise_is_found(how: str, tmp_path: Path) -> None:
    file = loaded("alerts.yaml")
    for alert in alerts(file):
        SPOILT[how](alert)
    assert misfiring(file, tmp_path) == set(NAMES)


def test_a_threshold_that_was_moved_is_found(tmp_path: Path) -> None:
    """The last number of each condition, made ten times as small or as large."""
    found: set[str] = set()
    moved: set[str] = set()
    for factor in (0.1, 10):
        file = loaded("alerts.yaml")
        for alert in alerts(file):
            match = re.search(r"([0-9.]+)( \* 86400)?$", alert["expr"])
            if match is not None and float(match[1]):
                number = f"{float(match[1]) * factor:g}"
                alert["expr"] = alert["expr"][: match.start(1)] + number + (match[2] or "")
                moved.add(alert["alert"])
        found |= misfiring(file, tmp_path)
    # The others ask whether something is 0.
    assert len(moved) >= len(NAMES) - 3
    assert found >= moved


def misfiring(file: File, folder: Path) -> set[str]:
    """The alerts that fire in other situations than alerts_test.yaml says."""
    (folder / "alerts.yaml").write_text(yaml.safe_dump(file))
    situations = folder / "situations.yaml"
    situations.write_text((OBSERVABILITY / "alerts_test.yaml").read_text())
    ended = run("promtool", "test", "rules", situations)
    found = set(re.findall(r"alertname:\s*(\w+)", said(ended)))
    # Whatever else it may have against them.
    assert bool(found) == bool(ended.returncode), said(ended)
    return found
