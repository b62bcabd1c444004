"""Whether objects find each other: by name, by label, by port."""

from __future__ import annotations

from collections.abc import Iterator

from tests.deploy.checks.configuration import made_by_hand
from tests.deploy.objects import Manifests, Object, selects


def names(manifests: Manifests) -> Iterator[str]:
    """Whatever is referred to by name is there, or the guide has people make it."""
    by_hand = made_by_hand()
    for kind, name in referred(manifests):
        if manifests.named(kind, name) is None and (kind, name) not in by_hand:
            yield f"{kind} {name} is nowhere"
    namespaces = {
        each["metadata"].get("namespace")
        for each in manifests.objects
        if each["kind"] != "Namespace"
    }
    own = {each["metadata"]["name"] for each in manifests.of("Namespace")}
    if namespaces != own:
        yield f"objects are in {namespaces}, and the namespaces are {own}"


def referred(manifests: Manifests) -> Iterator[tuple[str, str]]:
    """Kind and name of all that objects refer to in their own namespace."""
    pod = manifests.pod
    yield "ServiceAccount", pod["serviceAccountName"]
    for volume in pod.get("volumes", []):
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in manifests.all_containers:
        for source in container.get("envFrom", []):
            for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if key in source:
                    yield kind, source[key]["name"]
    for scaler in manifests.of("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        yield target["kind"], target["name"]
    for route in manifests.of("GRPCRoute"):
        for backend in _backends(route):
            yield backend.get("kind", "Service"), backend["name"]
    for kind in ("BackendTLSPolicy", "BackendTrafficPolicy"):
        for policy in manifests.of(kind):
            for target in policy["spec"]["targetRefs"]:
                yield target["kind"], target["name"]
            for authority in policy["spec"].get("validation", {}).get("caCertificateRefs", []):
                yield authority["kind"], authority["name"]


def selectors(manifests: Manifests) -> Iterator[str]:
    """Every selector selects our pods, and the ServiceMonitor one Service."""
    labels = manifests.pod_labels
    deployment = manifests.deployment["spec"]
    selecting = [("the Deployment", deployment["selector"].get("matchLabels"))]
    selecting += [
        (f"Service {each['metadata']['name']}", each["spec"].get("selector"))
        for each in manifests.of("Service")
    ]
    selecting += [
        (
            f"PodDisruptionBudget {each['metadata']['name']}",
            each["spec"]["selector"].get("matchLabels"),
        )
        for each in manifests.of("PodDisruptionBudget")
    ]
    selecting += [
        (
            f"NetworkPolicy {each['metadata']['name']}",
            each["spec"]["podSelector"].get("matchLabels"),
        )
        for each in manifests.of("NetworkPolicy")
    ]
    selecting += [
        (f"spreading over {each['topologyKey']}", each["labelSelector"].get("matchLabels"))
        for each in manifests.pod.get("topologySpreadConstraints", [])
    ]
    for who, selector in selecting:
        if not selects(selector, labels):
            yield f"{who} does not select the pods"
    for monitor in manifests.of("ServiceMonitor"):
        found = monitored(manifests, monitor)
        if len(found) != 1:
            # With two, each replica would be scraped and counted twice.
            yield f"the ServiceMonitor selects {len(found)} Services"


def monitored(manifests: Manifests, monitor: Object) -> list[Object]:
    """The Services that a ServiceMonitor selects."""
    selector = monitor["spec"]["selector"]["matchLabels"]
    return [
        each
        for each in manifests.of("Service")
        if selects(selector, each["metadata"].get("labels", {}))
    ]


def service_ports(manifests: Manifests) -> Iterator[str]:
    """Services, routes, monitors and policies name ports that there are, by the right number."""
    named = {each["name"]: each["containerPort"] for each in manifests.container["ports"]}
    for service in manifests.of("Service"):
        for port in service["spec"]["ports"]:
            where = f"Service {service['metadata']['name']}"
            target = port.get("targetPort", port["port"])
            if target not in named:
                yield f"{where}: there is no port {target}"
            # A headless Service's port is not translated: callers come to the pod by it.
            elif service["spec"].get("clusterIP") == "None" and port["port"] != named[target]:
                yield f"{where}: {target} is at {named[target]}, not at {port['port']}"
    for monitor in manifests.of("ServiceMonitor"):
        there = {
            port["name"]: port["targetPort"]
            for service in monitored(manifests, monitor)
            for port in service["spec"]["ports"]
        }
        for endpoint in monitor["spec"]["endpoints"]:
            if there.get(endpoint["port"]) != "metrics":
                yield f"the ServiceMonitor's port {endpoint['port']} is not that of the metrics"
    for policy in manifests.of("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            for port in rule.get("ports", []):
                if port["port"] not in {*named, *named.values()}:
                    yield f"the NetworkPolicy opens {port['port']}, which there is not"
    for route in manifests.of("GRPCRoute"):
        for backend in _backends(route):
            target = manifests.named("Service", backend["name"])
            numbers = {each["port"] for each in target["spec"]["ports"]} if target else set()
            if backend["port"] not in numbers:
                yield f"the GRPCRoute goes to port {backend['port']} of {backend['name']}"
    for policy in manifests.of("BackendTLSPolicy"):
        for ref in policy["spec"]["targetRefs"]:
            target = manifests.named(ref["kind"], ref["name"])
            called = {each["name"] for each in target["spec"]["ports"]} if target else set()
            if ref.get("sectionName") not in called:
                yield f"the BackendTLSPolicy is for port {ref.get('sectionName')}"


def _backends(route: Object) -> list[Object]:
    return [backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]]
