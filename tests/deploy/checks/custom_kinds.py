"""The kinds that are no part of Kubernetes, as far as we use them: any other field is an error.

kubernetes-validate has no schema for them and lets anything pass. The fields are those of the
Gateway API v1, Envoy Gateway v1alpha1 and the Prometheus operator v1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tests.deploy.objects import Manifests, Object

GatewayDuration = Annotated[str, Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")]
PrometheusDuration = Annotated[str, Field(pattern=r"^(0|([0-9]+(ms|[smhdwy]))+)$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")]
HostName = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Strict):
    name: Name
    namespace: Name
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Any(_Strict):
    apiVersion: str  # noqa: N815 - Kubernetes' name
    kind: str
    metadata: _Metadata


class _ParentRef(_Strict):
    group: str = "gateway.networking.k8s.io"
    kind: str = "Gateway"
    name: Name
    namespace: Name | None = None
    sectionName: Name | None = None  # noqa: N815
    port: Port | None = None


class _MethodMatch(_Strict):
    type: Literal["Exact", "RegularExpression"] = "Exact"
    service: str | None = None
    method: str | None = None


class _RouteMatch(_Strict):
    method: _MethodMatch


class _BackendRef(_Strict):
    group: str = ""
    kind: str = "Service"
    name: Name
    port: Port
    weight: int = 1


class _RouteRule(_Strict):
    name: Name | None = None
    matches: list[_RouteMatch] = []
    backendRefs: Annotated[list[_BackendRef], Field(min_length=1)]  # noqa: N815


class _RouteSpec(_Strict):
    parentRefs: Annotated[list[_ParentRef], Field(min_length=1)]  # noqa: N815
    hostnames: list[HostName] = []
    rules: Annotated[list[_RouteRule], Field(min_length=1)]


class _GRPCRoute(_Any):
    spec: _RouteSpec


class _TargetRef(_Strict):
    group: str
    kind: str
    name: Name
    sectionName: Name | None = None  # noqa: N815


class _Validation(_Strict):
    hostname: HostName
    caCertificateRefs: Annotated[list[_TargetRef], Field(min_length=1)]  # noqa: N815


class _BackendTLSSpec(_Strict):
    targetRefs: Annotated[list[_TargetRef], Field(min_length=1)]  # noqa: N815
    validation: _Validation


class _BackendTLSPolicy(_Any):
    spec: _BackendTLSSpec


class _HTTPTimeout(_Strict):
    requestTimeout: GatewayDuration  # noqa: N815
    maxStreamDuration: GatewayDuration  # noqa: N815
    streamIdleTimeout: GatewayDuration  # noqa: N815


class _Timeout(_Strict):
    http: _HTTPTimeout


class _LoadBalancer(_Strict):
    type: Literal["LeastRequest", "RoundRobin", "Random"]


class _BackendTrafficSpec(_Strict):
    targetRefs: Annotated[list[_TargetRef], Field(min_length=1)]  # noqa: N815
    timeout: _Timeout
    loadBalancer: _LoadBalancer  # noqa: N815


class _BackendTrafficPolicy(_Any):
    spec: _BackendTrafficSpec


class _Selector(_Strict):
    matchLabels: Annotated[dict[str, str], Field(min_length=1)]  # noqa: N815


class _Endpoint(_Strict):
    port: str
    path: Annotated[str, Field(pattern=r"^/")] = "/metrics"
    scheme: Literal["http", "https"] = "http"
    interval: PrometheusDuration
    scrapeTimeout: PrometheusDuration  # noqa: N815


class _ServiceMonitorSpec(_Strict):
    jobLabel: str  # noqa: N815
    selector: _Selector
    endpoints: Annotated[list[_Endpoint], Field(min_length=1)]


class _ServiceMonitor(_Any):
    spec: _ServiceMonitorSpec


class _Rule(_Strict):
    alert: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z]+$")]
    expr: Annotated[str, Field(min_length=1)]
    # `for` is a word of Python's.
    lasting: PrometheusDuration = Field("0s", alias="for")
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Group(_Strict):
    name: str
    interval: PrometheusDuration | None = None
    rules: Annotated[list[_Rule], Field(min_length=1)]


class _PrometheusRuleSpec(_Strict):
    groups: Annotated[list[_Group], Field(min_length=1)]


class _PrometheusRule(_Any):
    spec: _PrometheusRuleSpec


KINDS: dict[tuple[str, str], type[_Any]] = {
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _GRPCRoute,
    ("gateway.networking.k8s.io/v1", "BackendTLSPolicy"): _BackendTLSPolicy,
    ("gateway.envoyproxy.io/v1alpha1", "BackendTrafficPolicy"): _BackendTrafficPolicy,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _ServiceMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): _PrometheusRule,
}


def is_kubernetes_own(object_: Object) -> bool:
    """Whether kubernetes-validate has a schema: groups with a dot are others', but for k8s.io's."""
    group = object_["apiVersion"].rpartition("/")[0]
    return "." not in group or group in {
        "networking.k8s.io",
        "rbac.authorization.k8s.io",
        "storage.k8s.io",
        "scheduling.k8s.io",
    }


def custom_kinds(manifests: Manifests) -> Iterator[str]:
    """Kinds that others define have the fields that they define, of the right shape."""
    for each in manifests.objects:
        if is_kubernetes_own(each):
            continue
        kind = KINDS.get((each["apiVersion"], each["kind"]))
        where = f"{each['kind']} {each['metadata']['name']}"
        if kind is None:
            yield f"{where}: {each['apiVersion']} {each['kind']} is not known here"
            continue
        try:
            kind.model_validate(each)
        except ValidationError as error:
            for wrong in error.errors():
                yield f"{where}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
