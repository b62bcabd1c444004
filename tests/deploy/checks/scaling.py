"""Whether the number of replicas is one party's business, and goes by a metric that there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.deploy.checks.pods import quantity
from tests.deploy.exported import exported_metrics
from tests.deploy.objects import Manifests
from tests.deploy.promql import unknown_in
from tests.deploy.tools import ROOT

ADAPTER_RULES = ROOT / "docker" / "observability" / "adapter-rules.yaml"


def scaling(manifests: Manifests) -> Iterator[str]:
    """Either an autoscaler or a number, never both."""
    scalers = manifests.of("HorizontalPodAutoscaler")
    replicas = manifests.deployment["spec"].get("replicas")
    if scalers and replicas is not None:
        yield "the number of replicas is given, beside an autoscaler"
    if not scalers and replicas is None:
        yield "nothing says how many replicas there are"
    for scaler in scalers:
        spec = scaler["spec"]
        if scaler["apiVersion"] != "autoscaling/v2":
            yield f"the autoscaler is of {scaler['apiVersion']}"
        if not 2 <= spec.get("minReplicas", 1) < spec["maxReplicas"]:
            yield "one replica that fails would be all of them, or none can be added"
        yield from _metrics(spec)
    spread = {each["topologyKey"] for each in manifests.pod.get("topologySpreadConstraints", [])}
    if spread != {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}:
        yield f"replicas are spread over {spread}"


def _metrics(spec: dict[str, Any]) -> Iterator[str]:
    for metric in spec["metrics"]:
        if metric["type"] != "Pods":
            yield f"scaled on {metric['type']}, which says little of a service whose threads spin"
            continue
        name = metric["pods"]["metric"]["name"]
        if name not in {rule["name"]["as"] for rule in adapter_rules()}:
            yield f"no rule of the adapter makes {name}"
        target = metric["pods"]["target"]
        if target["type"] != "AverageValue" or not 0 < quantity(target["averageValue"]) < 1:
            yield "at the target load captions wait already"


def adapter_rules() -> list[dict[str, Any]]:
    """The rules of the Prometheus adapter."""
    rules: list[dict[str, Any]] = yaml.safe_load(ADAPTER_RULES.read_text())["rules"]
    return rules


def adapter_query(rule: dict[str, Any]) -> str:
    """The query that a rule makes of its template, for one pod."""
    query: str = rule["metricsQuery"]
    query = query.replace("<<.GroupBy>>", "pod")
    return query.replace("<<.LabelMatchers>>", 'namespace="n",pod="p"')


def unknown_to_gateway(rule: dict[str, Any]) -> Iterator[str]:
    """What a rule of the adapter asks for that a running gateway does not export."""
    yield from unknown_in(rule["seriesQuery"], exported_metrics())
    yield from unknown_in(adapter_query(rule), exported_metrics())
    if not any(re.fullmatch(rule["name"]["matches"], name) for name in exported_metrics()):
        yield f"{rule['name']['matches']} matches no metric"
