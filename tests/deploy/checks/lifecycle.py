"""Whether start, probes, rollouts and the end fit together, and fit what the service does."""

from __future__ import annotations

from collections.abc import Iterator

from captionserve_server.gateway.server import LIVE
from captionserve_server.serving.triton_process import END_SECONDS

from tests.deploy.checks.configuration import settings_of
from tests.deploy.objects import Manifests, Object

# A second Triton may be there while new versions are taken in.
_TRITONS = 2
# Python and the gateway, before Triton is begun with.
_BEGIN_SECONDS = 10


def starting(manifests: Manifests) -> Iterator[str]:
    """The kubelet waits longer for the start than the service does, a rollout longer still."""
    said = settings_of(manifests)
    if said is None:
        return
    probe = manifests.container.get("startupProbe", {})
    allowed = _patience(probe)
    # For Triton, and as long again for the first caption.
    needed = 2 * said.start_seconds + _BEGIN_SECONDS
    if allowed < needed:
        yield f"the start may take {needed:g} s, and the kubelet waits {allowed:g} s"
    progress = manifests.deployment["spec"].get("progressDeadlineSeconds", 600)
    if progress <= allowed:
        yield f"a rollout is given up after {progress} s, a start after {allowed:g} s"


def probes(manifests: Manifests) -> Iterator[str]:
    """Traffic comes while captions do; only a supervisor that is stuck is killed."""
    for kind, service in (("startupProbe", ""), ("readinessProbe", ""), ("livenessProbe", LIVE)):
        probe = manifests.container.get(kind)
        if probe is None or "grpc" not in probe:
            yield f"there is no {kind} over gRPC"
        elif probe["grpc"].get("service", "") != service:
            yield f"{kind} asks for {probe['grpc'].get('service')!r} instead of {service!r}"


def ending(manifests: Manifests) -> Iterator[str]:
    """The pod has time for all that its end takes, and callers have time to turn away."""
    said = settings_of(manifests)
    if said is None:
        return
    stop = manifests.container.get("lifecycle", {}).get("preStop", {})
    before = stop.get("sleep", {}).get("seconds", 0)
    if stop and "sleep" not in stop:
        yield "preStop is no sleep: the image need not have programs for it"
    # Captions are drained and Tritons ended one after the other.
    needed = before + said.balancer_seconds + said.drain_seconds + _TRITONS * END_SECONDS
    grace = manifests.pod.get("terminationGracePeriodSeconds", 30)
    if grace <= needed:
        yield f"the end may take {needed:g} s, and the pod is killed after {grace} s"
    if said.drain_seconds <= said.deadline_cap_seconds:
        yield "captions that take as long as they may are cut"
    if said.balancer_seconds < _patience(manifests.container.get("readinessProbe", {})):
        yield "calls are refused before the readiness probe has failed"


def rollout(manifests: Manifests) -> Iterator[str]:
    """No replica ends before its successor serves, and nodes can be drained."""
    strategy = manifests.deployment["spec"].get("strategy", {})
    rolling = strategy.get("rollingUpdate", {})
    if strategy.get("type") != "RollingUpdate" or rolling.get("maxUnavailable") != 0:
        yield "a rollout may take a replica away before there is another"
    if not rolling.get("maxSurge"):
        yield "a rollout cannot begin: no replica more, and none less"
    budgets = manifests.of("PodDisruptionBudget")
    if len(budgets) != 1:
        yield f"there are {len(budgets)} disruption budgets"
    for budget in budgets:
        if budget["spec"].get("maxUnavailable") != 1:
            yield "a node cannot be drained, or too many replicas at once"


def _patience(probe: Object) -> float:
    """How long a probe may fail before something follows."""
    return float(probe.get("failureThreshold", 3) * probe.get("periodSeconds", 10))
