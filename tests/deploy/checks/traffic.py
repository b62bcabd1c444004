"""Whether only what must come in and go out does, and long calls are not cut on their way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from captionserve_server.gateway.caption_service import SERVICE_NAME

from tests.deploy.checks.configuration import settings_of
from tests.deploy.objects import Manifests

_MONITORING = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
_DNS_PORT = 53


def network(manifests: Manifests) -> Iterator[str]:
    """In: calls, health, metrics for those who monitor. Out: DNS, and traces if they are sent."""
    policies = [each["spec"] for each in manifests.of("NetworkPolicy")]
    kinds = {kind for each in policies for kind in each.get("policyTypes", [])}
    if kinds != {"Ingress", "Egress"}:
        yield f"only {kinds} are governed"
    incoming = [rule for each in policies for rule in each.get("ingress", [])]
    opened: dict[str, list[Any]] = {}
    for rule in incoming:
        if not rule.get("ports"):
            yield "all ports are open to somebody"
        for port in rule.get("ports", []):
            opened.setdefault(port["port"], []).append(rule.get("from"))
    if set(opened) != {"grpc", "health", "metrics"}:
        yield f"the ports that are open are {sorted(opened)}"
    if opened.get("metrics") != [[_MONITORING]]:
        yield "metrics are open to others than those who monitor, or not to them"
    yield from _out(manifests, [rule for each in policies for rule in each.get("egress", [])])


def _out(manifests: Manifests, outgoing: list[dict[str, Any]]) -> Iterator[str]:
    wanted = {(_DNS_PORT, "UDP"), (_DNS_PORT, "TCP")}
    said = settings_of(manifests)
    if said is not None and said.otlp_endpoint:
        wanted.add((urlsplit(said.otlp_endpoint).port or 80, "TCP"))
    there = {
        (port["port"], port.get("protocol", "TCP"))
        for rule in outgoing
        for port in rule.get("ports", [])
    }
    if there != wanted:
        yield f"what may go out is {sorted(there)} instead of {sorted(wanted)}"
    for rule in outgoing:
        if not rule.get("to") or not rule.get("ports"):
            yield "something may go anywhere"


def streams(manifests: Manifests) -> Iterator[str]:
    """Where there is a route, nothing on it ends a call that works."""
    said = settings_of(manifests)
    for route in manifests.of("GRPCRoute"):
        name = route["metadata"]["name"]
        services = {
            match["method"].get("service")
            for rule in route["spec"]["rules"]
            for match in rule.get("matches", [])
        }
        if SERVICE_NAME not in services:
            yield f"captions do not come through: {services}"
        policies = [
            each["spec"]
            for each in manifests.of("BackendTrafficPolicy")
            if ("GRPCRoute", name)
            in {(ref["kind"], ref["name"]) for ref in each["spec"]["targetRefs"]}
        ]
        if len(policies) != 1:
            yield f"{len(policies)} policies say how long calls of {name} may last"
        for policy in policies:
            times = policy["timeout"]["http"]
            for kind in ("requestTimeout", "maxStreamDuration"):
                if _seconds(times.get(kind, "15s")):
                    yield f"{kind} cuts calls"
            if said and _seconds(times.get("streamIdleTimeout", "0s")) <= said.deadline_cap_seconds:
                yield "streamIdleTimeout cuts calls that work on their first word"
        if said is not None and said.tls_certificate and not manifests.of("BackendTLSPolicy"):
            yield "the Gateway would speak plaintext to replicas that speak TLS"
        if said is not None and said.tls_client_ca:
            yield "callers' certificates end at the Gateway"


def _seconds(duration: str) -> float:
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"(\d+)(ms|h|m|s)", duration))
