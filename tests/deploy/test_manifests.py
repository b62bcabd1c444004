"""The manifests are right as they are, and each check finds the mistake that it is there for."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from captionserve_server.serving.triton_process import END_SECONDS

from tests.deploy.checks import CHECKS, wrong
from tests.deploy.checks.configuration import GUIDE, made_by_hand, settings_of
from tests.deploy.checks.custom_kinds import KINDS, is_kubernetes_own
from tests.deploy.checks.pods import memory_megabytes, placeholders
from tests.deploy.checks.references import referred
from tests.deploy.objects import Manifests, Object, find
from tests.deploy.rendered import ADDED, KUBERNETES, OVERLAYS, VARIANTS, rendered, text_of
from tests.deploy.tools import run, said

KUBERNETES_VERSIONS = ("1.36", "1.37")
POD = "spec.template.spec"
OURS = f"{POD}.containers[captionserve]"
_GONE = object()


def test_every_overlay_and_component_is_checked() -> None:
    overlays = {folder.name for folder in (KUBERNETES / "overlays").iterdir()}
    assert overlays == set(OVERLAYS)
    used = {
        Path(line.strip("- \n")).name
        for overlay in OVERLAYS
        for line in (KUBERNETES / "overlays" / overlay / "kustomization.yaml").open()
        if "components/" in line
    }
    components = {folder.name for folder in (KUBERNETES / "components").iterdir()}
    assert components == used | set(ADDED)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_wrong(variant: str) -> None:
    assert wrong(rendered(variant)) == []


def test_what_people_make_by_hand_is_used() -> None:
    used = {each for variant in VARIANTS for each in referred(rendered(variant))}
    assert set(made_by_hand()) <= used


def test_the_guide_has_the_figures() -> None:
    """Its sum of the memory, the seconds of the end, and a pod to fill the claim."""
    guide = GUIDE.read_text()
    manifests = rendered("cpu")
    settings = settings_of(manifests)
    assert settings is not None
    rows = dict(re.findall(r"^\| (\S[^|]*?) \| (\d[^|]*?) \|", guide, re.MULTILINE))
    assert rows["in all"] == str(memory_megabytes(settings))
    assert rows["`--balancer-seconds`"] == f"{settings.balancer_seconds:g}"
    assert rows["`--drain-seconds`"] == f"{settings.drain_seconds:g}"
    assert rows["preStop"] == str(manifests.container["lifecycle"]["preStop"]["sleep"]["seconds"])
    assert rows["Triton"] == f"{END_SECONDS}, or {2 * END_SECONDS}"
    filling = textwrap.dedent(guide.split("    # fill.yaml\n")[1].split("\n\n")[0])
    pod = yaml.safe_load(filling)["spec"]
    (volume,) = pod["volumes"]
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert manifests.named("PersistentVolumeClaim", claim) is not None
    assert pod["securityContext"]["runAsUser"] == manifests.pod["securityContext"]["runAsUser"]


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_schemas_of_kubernetes_are_met(variant: str, version: str, tmp_path: Path) -> None:
    code, messages = validated(text_of(variant), version, tmp_path)
    assert code == 0, messages
    # What it passes unread is what we have schemas of our own for, and nothing else.
    unread = {line.split(" for kind ")[1].split()[0] for line in messages if "for kind" in line}
    others = {each["kind"] for each in rendered(variant).objects if not is_kubernetes_own(each)}
    assert unread == others
    assert others <= {kind for _, kind in KINDS}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_a_field_that_kubernetes_does_not_know_is_found(version: str, tmp_path: Path) -> None:
    text = text_of("cpu").replace("periodSeconds: 2", "periodSecond: 2", 1)
    code, messages = validated(text, version, tmp_path)
    assert code != 0
    assert any("periodSecond" in line for line in messages)


def validated(text: str, version: str, folder: Path) -> tuple[int, list[str]]:
    """What kubernetes-validate says of manifests."""
    path = folder / "manifests.yaml"
    path.write_text(text)
    ended = run("kubernetes-validate", "-k", version, "--strict", path)
    return ended.returncode, said(ended).splitlines()


def test_a_release_is_refused_with_placeholders(request: pytest.FixtureRequest) -> None:
    found = [what for variant in VARIANTS for what in placeholders(rendered(variant))]
    if request.config.getoption("--release"):
        assert found == []
        return
    manifests = rendered("image-volume")
    # The service's image, and the models'.
    assert len(list(placeholders(manifests))) == 2
    change(manifests, "Deployment", f"{OURS}.image", f"registry.example/x:1@sha256:{'a' * 64}")
    assert len(list(placeholders(manifests))) == 1


@dataclass(frozen=True)
class Mutation:
    """A mistake, and the check that must find it.

    Attributes:
        check: its name.
        mistake: makes it.
        variant: what it is made in.
    """

    check: str
    mistake: Callable[[Manifests], object]
    variant: str = "cpu"


def change(manifests: Manifests, kind: str, path: str, value: Any = _GONE, name: str = "") -> None:
    """Set a value in an object, or take it away."""
    objects = [each for each in manifests.of(kind) if name in ("", each["metadata"]["name"])]
    inside, key = find(objects[0], path)
    if value is _GONE:
        del inside[key]
    else:
        inside[key] = value


def mutation(
    check: str, kind: str, path: str, value: Any = _GONE, *, variant: str = "cpu", name: str = ""
) -> Mutation:
    return Mutation(check, lambda manifests: change(manifests, kind, path, value, name), variant)


def deployed(check: str, path: str, value: Any = _GONE, *, variant: str = "cpu") -> Mutation:
    return mutation(check, "Deployment", path, value, variant=variant)


def configured(check: str, name: str, value: Any = _GONE, *, variant: str = "cpu") -> Mutation:
    return mutation(check, "ConfigMap", f"data.CAPTIONSERVE_{name}", value, variant=variant)


def add(kind: str, path: str, value: Any) -> Callable[[Manifests], object]:
    """Append to a list in an object."""

    def added(manifests: Manifests) -> None:
        inside, key = find(manifests.of(kind)[0], path)
        inside.setdefault(key, []).append(value)

    return added


def without(kind: str) -> Callable[[Manifests], object]:
    def removed(manifests: Manifests) -> None:
        manifests.objects = [each for each in manifests.objects if each["kind"] != kind]

    return removed


def twice(kind: str) -> Callable[[Manifests], object]:
    def doubled(manifests: Manifests) -> None:
        first: Object = manifests.of(kind)[0]
        copy = {**first, "metadata": {**first["metadata"], "name": "another"}}
        manifests.objects.append(copy)

    return doubled


INIT = {"name": "prepare", "image": f"busybox:1@sha256:{'a' * 64}"}
LABEL = "app~kubernetes~io/name"
BOUNDS = {"cpu": "1", "memory": "64Mi"}
ROUTE = "spec.rules[0].backendRefs[captionserve]"
TIMES = "spec.timeout.http"

MUTATIONS = (
    configured("settings", "DRAIN_SECONDZ", "65"),
    configured("settings", "LOG_FORMAT", "xml"),
    deployed("settings", f"{OURS}.args", ["serve", "--no-such-flag"]),
    deployed("settings", f"{OURS}.args", ["export"]),
    configured("settings", "TOKENS"),
    configured("guarded", "INSECURE", "true"),
    configured("files", "TLS_KEY", "/etc/captionserve/tls/key.pem"),
    configured("files", "TOKENS", "/etc/tokens.txt"),
    configured("files", "MODEL_REPOSITORY", "/srv/models"),
    configured("files", "TLS_CLIENT_CA", "/tmp/ca.crt", variant="cpu-mtls"),
    deployed("files", f"{OURS}.volumeMounts[tls].subPath", "tls.crt"),
    deployed("files", f"{POD}.volumes[tls].secret.defaultMode"),
    configured("ports", "LISTEN", "0.0.0.0:9100"),
    configured("ports", "METRICS_LISTEN", "127.0.0.1:9002"),
    configured("ports", "HEALTH_LISTEN"),
    deployed("ports", f"{OURS}.livenessProbe.grpc.port", 9000),
    deployed("ports", f"{OURS}.ports[health].containerPort", 9011),
    deployed("names", f"{POD}.volumes[tls].secret.secretName", "captionserve-cert"),
    deployed("names", f"{POD}.volumes[models].persistentVolumeClaim.claimName", "models"),
    deployed("names", f"{POD}.serviceAccountName", "captioner"),
    deployed("names", f"{OURS}.envFrom[0].configMapRef.name", "captionserve-settings"),
    mutation("names", "HorizontalPodAutoscaler", "spec.scaleTargetRef.name", "caption-serve"),
    mutation("names", "GRPCRoute", f"{ROUTE}.name", "captions", variant="route"),
    mutation("names", "BackendTLSPolicy", "spec.targetRefs[0].name", "captions", variant="route"),
    mutation(
        "names", "BackendTrafficPolicy", "spec.targetRefs[0].name", "captions", variant="route"
    ),
    mutation(
        "names",
        "BackendTLSPolicy",
        "spec.validation.caCertificateRefs[0].name",
        "ca",
        variant="route",
    ),
    mutation("names", "PersistentVolumeClaim", "metadata.namespace", "default"),
    deployed("selectors", f"spec.selector.matchLabels.{LABEL}", "caption-serve"),
    mutation("selectors", "Service", f"spec.selector.{LABEL}", "captions", name="captionserve"),
    mutation("selectors", "Service", "spec.selector", {}, name="captionserve-headless"),
    mutation("selectors", "PodDisruptionBudget", f"spec.selector.matchLabels.{LABEL}", "captions"),
    mutation("selectors", "NetworkPolicy", f"spec.podSelector.matchLabels.{LABEL}", "captions"),
    deployed(
        "selectors",
        f"{POD}.topologySpreadConstraints[0].labelSelector.matchLabels.{LABEL}",
        "captions",
    ),
    mutation(
        "selectors",
        "ServiceMonitor",
        "spec.selector.matchLabels",
        {LABEL.replace("~", "."): "captionserve"},
    ),
    mutation(
        "service_ports", "Service", "spec.ports[grpc].targetPort", "caption", name="captionserve"
    ),
    mutation(
        "service_ports", "Service", "spec.ports[grpc].port", 443, name="captionserve-headless"
    ),
    mutation("service_ports", "ServiceMonitor", "spec.endpoints[0].port", "http"),
    mutation("service_ports", "NetworkPolicy", "spec.ingress[0].ports[0].port", 9443),
    mutation("service_ports", "GRPCRoute", f"{ROUTE}.port", 443, variant="route"),
    mutation(
        "service_ports",
        "BackendTLSPolicy",
        "spec.targetRefs[0].sectionName",
        "https",
        variant="route",
    ),
    configured("starting", "START_SECONDS", "300"),
    deployed("starting", f"{OURS}.startupProbe.failureThreshold", 30),
    deployed("starting", "spec.progressDeadlineSeconds", 120),
    deployed("probes", f"{OURS}.livenessProbe.grpc.service", ""),
    deployed("probes", f"{OURS}.readinessProbe.grpc.service", "live"),
    deployed("probes", f"{OURS}.startupProbe"),
    configured("ending", "DRAIN_SECONDS", "90"),
    configured("ending", "DRAIN_SECONDS", "30"),
    configured("ending", "BALANCER_SECONDS", "1"),
    deployed("ending", f"{POD}.terminationGracePeriodSeconds", 60),
    deployed("ending", f"{POD}.terminationGracePeriodSeconds"),
    deployed("ending", f"{OURS}.lifecycle.preStop.sleep.seconds", 30),
    deployed("ending", f"{OURS}.lifecycle.preStop", {"exec": {"command": ["sleep", "5"]}}),
    deployed("rollout", "spec.strategy.rollingUpdate.maxUnavailable", "25%"),
    deployed("rollout", "spec.strategy", {"type": "Recreate"}),
    deployed("rollout", "spec.strategy.rollingUpdate.maxSurge", 0),
    mutation("rollout", "PodDisruptionBudget", "spec.maxUnavailable", 0),
    Mutation("rollout", without("PodDisruptionBudget")),
    mutation(
        "restricted", "Namespace", "metadata.labels.pod-security~kubernetes~io/enforce", "baseline"
    ),
    Mutation("restricted", without("Namespace")),
    deployed("restricted", f"{POD}.securityContext.runAsNonRoot"),
    deployed("restricted", f"{POD}.securityContext.runAsUser", 0),
    deployed("restricted", f"{POD}.securityContext.seccompProfile"),
    deployed("restricted", f"{POD}.hostNetwork", True),
    deployed("restricted", f"{POD}.volumes[tmp]", {"name": "tmp", "hostPath": {"path": "/tmp"}}),
    deployed("restricted", f"{OURS}.securityContext.allowPrivilegeEscalation", True),
    deployed("restricted", f"{OURS}.securityContext.privileged", True),
    deployed("restricted", f"{OURS}.securityContext.capabilities.drop", ["NET_RAW"]),
    deployed("restricted", f"{OURS}.securityContext.capabilities.add", ["SYS_PTRACE"]),
    deployed("restricted", f"{OURS}.securityContext.readOnlyRootFilesystem", False),
    deployed("restricted", f"{OURS}.ports[grpc].hostPort", 9000),
    Mutation("restricted", add("Deployment", f"{POD}.initContainers", {**INIT, "resources": {}})),
    deployed("same_user", f"{POD}.securityContext.runAsUser", 1000),
    deployed("same_user", f"{POD}.securityContext.fsGroup"),
    deployed("isolated", f"{POD}.automountServiceAccountToken", True),
    deployed("isolated", f"{POD}.enableServiceLinks"),
    deployed("resources", f"{OURS}.resources.requests.cpu", "2"),
    deployed("resources", f"{OURS}.resources.limits.memory", "4Gi"),
    deployed(
        "resources",
        f"{OURS}.resources",
        {
            "requests": {"cpu": "1500m", "memory": "3Gi"},
            "limits": {"cpu": "1500m", "memory": "3Gi"},
        },
    ),
    deployed("resources", f"{OURS}.resources", {}),
    Mutation(
        "resources",
        add("Deployment", f"{POD}.initContainers", {**INIT, "resources": {"limits": BOUNDS}}),
    ),
    deployed("writable_places", f"{POD}.volumes[shared-memory].emptyDir.medium"),
    deployed("writable_places", f"{POD}.volumes[tmp].emptyDir", {}),
    deployed("writable_places", f"{OURS}.volumeMounts[tmp]"),
    deployed("writable_places", f"{OURS}.volumeMounts[models].readOnly", False),
    deployed("writable_places", f"{POD}.volumes[models].persistentVolumeClaim.readOnly"),
    configured("memory", "MAX_MESSAGE_MEGABYTES", "256"),
    configured("memory", "MAX_REQUEST_MEGABYTES", "2048"),
    configured("memory", "CACHE_MEGABYTES", "4096"),
    deployed("memory", f"{POD}.volumes[shared-memory].emptyDir.sizeLimit", "64Mi"),
    deployed("memory", f"{POD}.volumes[shared-memory].emptyDir.sizeLimit", "2Gi"),
    deployed("memory", f"{OURS}.resources.limits.memory", "2Gi"),
    deployed("images", f"{OURS}.image", "captionserve-server:0.1.0"),
    deployed("images", f"{OURS}.image", f"captionserve-server:0.0.9@sha256:{'a' * 64}"),
    deployed("images", "spec.template.metadata.labels.app~kubernetes~io/version", "0.0.9"),
    deployed(
        "images", f"{POD}.volumes[models].image.reference", "models:1", variant="image-volume"
    ),
    Mutation("images", add("Deployment", f"{POD}.initContainers", {**INIT, "image": "busybox:1"})),
    deployed("scaling", "spec.replicas", 2),
    deployed("scaling", "spec.replicas", variant="dev"),
    mutation("scaling", "HorizontalPodAutoscaler", "apiVersion", "autoscaling/v2beta2"),
    mutation("scaling", "HorizontalPodAutoscaler", "spec.minReplicas", 1),
    mutation("scaling", "HorizontalPodAutoscaler", "spec.maxReplicas", 2),
    mutation(
        "scaling",
        "HorizontalPodAutoscaler",
        "spec.metrics[0].pods.metric.name",
        "captionserve_busy",
    ),
    mutation("scaling", "HorizontalPodAutoscaler", "spec.metrics[0].pods.target.averageValue", "7"),
    mutation("scaling", "HorizontalPodAutoscaler", "spec.metrics[0].type", "Resource"),
    deployed("scaling", f"{POD}.topologySpreadConstraints[1]"),
    mutation("network", "NetworkPolicy", "spec.policyTypes", ["Ingress"]),
    mutation("network", "NetworkPolicy", "spec.ingress[1].from"),
    mutation("network", "NetworkPolicy", "spec.ingress[1].ports"),
    mutation("network", "NetworkPolicy", "spec.ingress[0].ports[0]"),
    mutation("network", "NetworkPolicy", "spec.egress[0].to"),
    mutation("network", "NetworkPolicy", "spec.egress[0].ports[1]"),
    Mutation("network", add("NetworkPolicy", "spec.egress", {"to": [{"podSelector": {}}]})),
    configured("network", "OTLP_ENDPOINT", "http://collector:4318", variant="tracing"),
    configured("network", "OTLP_ENDPOINT", variant="tracing"),
    mutation("streams", "BackendTrafficPolicy", f"{TIMES}.requestTimeout", "15s", variant="route"),
    mutation(
        "streams", "BackendTrafficPolicy", f"{TIMES}.maxStreamDuration", "10m", variant="route"
    ),
    mutation(
        "streams", "BackendTrafficPolicy", f"{TIMES}.streamIdleTimeout", "30s", variant="route"
    ),
    mutation(
        "streams", "BackendTrafficPolicy", "spec.targetRefs[0].kind", "HTTPRoute", variant="route"
    ),
    Mutation("streams", without("BackendTrafficPolicy"), "route"),
    Mutation("streams", without("BackendTLSPolicy"), "route"),
    configured("streams", "TLS_CLIENT_CA", "/etc/captionserve/tls/ca.crt", variant="route"),
    mutation(
        "streams",
        "GRPCRoute",
        "spec.rules[0].matches[0].method.service",
        "captionserve.v1.Captions",
        variant="route",
    ),
    mutation(
        "custom_kinds", "GRPCRoute", "spec.rules[0].timeouts", {"request": "0s"}, variant="route"
    ),
    mutation("custom_kinds", "GRPCRoute", f"{ROUTE}.port", "grpc", variant="route"),
    mutation("custom_kinds", "GRPCRoute", "spec.parentRefs", variant="route"),
    mutation(
        "custom_kinds",
        "GRPCRoute",
        "apiVersion",
        "gateway.networking.k8s.io/v1beta9",
        variant="route",
    ),
    mutation("custom_kinds", "BackendTLSPolicy", "spec.tls", {}, variant="route"),
    mutation(
        "custom_kinds", "BackendTrafficPolicy", f"{TIMES}.requestTimeout", "never", variant="route"
    ),
    mutation("custom_kinds", "ServiceMonitor", "spec.endpoints[0].targetport", 9002),
    mutation("custom_kinds", "ServiceMonitor", "spec.endpoints[0].interval", "15 s"),
    mutation("custom_kinds", "PrometheusRule", "spec.groups[0].rules[0].form", "2m"),
    mutation("custom_kinds", "PrometheusRule", "spec.groups[0].rules[0].for", "2 minutes"),
    mutation("custom_kinds", "PrometheusRule", "spec.groups[0].rules[0].expr"),
)


def test_every_check_has_mutations() -> None:
    assert {each.check for each in MUTATIONS} == set(CHECKS)


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_a_mistake_is_found_by_its_check(number: int) -> None:
    each = MUTATIONS[number]
    manifests = rendered(each.variant)
    each.mistake(manifests)
    found = list(CHECKS[each.check](manifests))
    assert found != [], f"mutation {number} of {each.check}"
