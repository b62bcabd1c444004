"""compose.yaml, alone and with TLS, runs the service as the manifests do; each mistake is found."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from captionserve_server.serving.triton_process import END_SECONDS
from captionserve_server.settings import VARIABLE_PREFIX, Settings
from pydantic import ValidationError

from tests.deploy.checks.configuration import FILES, KNOWN_VARIABLES, LISTENS
from tests.deploy.checks.pods import MEGABYTE, VERSION, memory_megabytes, shared_megabytes
from tests.deploy.tools import ROOT, run, said

DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
WITH_TLS = DOCKER / "compose.tls.yaml"
VARIANTS = {"plain": (COMPOSE,), "tls": (COMPOSE, WITH_TLS)}
# Folders of the machine, which whoever runs it names.
GIVEN = {"MODELS": "/given/models", "SECRETS": "/given/secrets"}
_UNITS = {"h": 3600, "m": 60, "s": 1}

Compose = dict[str, Any]
Service = dict[str, Any]


@functools.cache
def text_of(variant: str) -> str:
    """What compose makes of its files, with all variables and defaults put in."""
    chosen = [part for path in VARIANTS[variant] for part in ("--file", path)]
    arguments = (*chosen, "--profile", "*", "config", "--format", "json")
    ended = run("docker-compose", *arguments, environment=GIVEN)
    assert ended.returncode == 0, said(ended)
    return ended.stdout


def composed(variant: str) -> Compose:
    compose: Compose = json.loads(text_of(variant))
    return compose


def settings_of(service: Service) -> Settings | None:
    given = {
        KNOWN_VARIABLES[name]: value
        for name, value in service["environment"].items()
        if name in KNOWN_VARIABLES and value
    }
    try:
        return Settings.model_validate(given | {"model_repository": ROOT})
    except ValidationError:
        return None


def settings(compose: Compose) -> Iterator[str]:
    """Every variable is a setting, accepted, and known to the image's own health check."""
    service = compose["services"]["captionserve"]
    for name in service["environment"]:
        if name.startswith(VARIABLE_PREFIX) and name not in KNOWN_VARIABLES:
            yield f"{name} is no setting"
    if service["command"] != ["serve"]:
        yield f"the command is {service['command']}"
    accepted = settings_of(service)
    if accepted is None:
        yield "the settings are not accepted"
        return
    for name, setting in LISTENS.items():
        address = getattr(accepted, setting) or ""
        if not address.startswith("0.0.0.0:"):
            yield f"{name} is at {address!r}"


def open_ports(compose: Compose) -> Iterator[str]:
    """Nothing is open to other machines but the service's own port, and that only if guarded."""
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            if port.get("host_ip") == "127.0.0.1":
                continue
            accepted = settings_of(service) if name == "captionserve" else None
            if accepted is None or accepted.insecure:
                yield f"{name}: {port['target']} is open to others"
    accepted = settings_of(compose["services"]["captionserve"])
    published = [port["target"] for port in compose["services"]["captionserve"]["ports"]]
    if accepted and published != [int(accepted.listen.rpartition(":")[2])]:
        yield f"the service's ports are {published}"


def confined(compose: Compose) -> Iterator[str]:
    """No container has capabilities, and ours writes to bounded places in memory only."""
    for name, service in compose["services"].items():
        if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
            yield f"{name} has capabilities"
        if "no-new-privileges:true" not in service.get("security_opt", []):
            yield f"{name} may gain privileges"
        if service.get("privileged"):
            yield f"{name} is privileged"
    service = compose["services"]["captionserve"]
    if service.get("read_only") is not True:
        yield "the service can write to its root"
    if service.get("user"):
        yield "another user than the image's"
    mounts = dict(mount.partition(":")[::2] for mount in service.get("tmpfs", []))
    options = mounts.get("/tmp", "").split(",")
    # Docker's own default is noexec.
    if "exec" not in options or not any(option.startswith("size=") for option in options):
        yield f"/tmp is not bounded, or nothing runs from there: {options}"
    for volume in service["volumes"]:
        if volume.get("read_only") is not True:
            yield f"{volume['target']} can be written to"


def sizes(compose: Compose) -> Iterator[str]:
    """Memory, /dev/shm and the time for the end are what the formulas want."""
    service = compose["services"]["captionserve"]
    accepted = settings_of(service)
    if accepted is None:
        return
    if int(service.get("shm_size", 0)) < shared_megabytes(accepted) * MEGABYTE:
        yield f"/dev/shm needs {shared_megabytes(accepted)} MiB"
    if int(service.get("mem_limit", 0)) < memory_megabytes(accepted) * MEGABYTE:
        yield f"the service needs {memory_megabytes(accepted)} MiB"
    grace = sum(
        int(number) * _UNITS[unit]
        for number, unit in re.findall(r"(\d+)([hms])", service.get("stop_grace_period", "10s"))
    )
    if grace <= accepted.balancer_seconds + accepted.drain_seconds + 2 * END_SECONDS:
        yield f"it is killed after {grace} s"
    if accepted.drain_seconds <= accepted.deadline_cap_seconds:
        yield "captions that take as long as they may are cut"


def files(compose: Compose) -> Iterator[str]:
    """What settings name is mounted, and what is mounted from here is here."""
    service = compose["services"]["captionserve"]
    targets = {PurePosixPath(volume["target"]) for volume in service["volumes"]}
    for name in FILES:
        path = service["environment"].get(f"{VARIABLE_PREFIX}{name.upper()}")
        if path and not targets & {PurePosixPath(path), *PurePosixPath(path).parents}:
            yield f"{path} is not mounted"
    for name, each in compose["services"].items():
        for volume in each.get("volumes", []):
            source = volume.get("source", "")
            if volume["type"] != "bind" or source in GIVEN.values():
                continue
            if not Path(source).exists():
                yield f"{name}: {source} is not there"
            if volume.get("read_only") is not True:
                yield f"{name} can write to {source}"


def images(compose: Compose) -> Iterator[str]:
    """Images are of a named version, ours of this one."""
    for name, service in compose["services"].items():
        if not re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+", service["image"]):
            yield f"{name}: {service['image']} may be another tomorrow"
    if compose["services"]["captionserve"]["image"] != f"captionserve-server:{VERSION}":
        yield "another version of the service"


def monitored(compose: Compose) -> Iterator[str]:
    """Prometheus asks the service's metrics and reads the alerts; Grafana asks that Prometheus."""
    services = compose["services"]
    inside = {
        volume["target"]: Path(volume["source"])
        for name in ("prometheus", "grafana")
        for volume in services[name]["volumes"]
        if volume["type"] == "bind"
    }
    configuration = inside.get("/etc/prometheus/prometheus.yml")
    if configuration is None:
        yield "Prometheus has no configuration"
        return
    prometheus = yaml.safe_load(configuration.read_text())
    (job,) = prometheus["scrape_configs"]
    port = services["captionserve"]["environment"]["CAPTIONSERVE_METRICS_LISTEN"].rpartition(":")[2]
    if job["static_configs"] != [{"targets": [f"captionserve:{port}"]}]:
        yield f"Prometheus asks {job['static_configs']}"
    for rules in prometheus["rule_files"]:
        if f"/etc/prometheus/{rules}" not in inside:
            yield f"Prometheus does not have {rules}"
    provisioning = PurePosixPath("/etc/grafana/provisioning")
    for kind in ("datasources", "dashboards"):
        if str(provisioning / kind) not in inside:
            yield f"Grafana does not have the {kind}"
            return
    source = yaml.safe_load(
        (inside[str(provisioning / "datasources")] / "prometheus.yaml").read_text()
    )
    if {each["url"] for each in source["datasources"]} != {"http://prometheus:9090"}:
        yield "Grafana asks another"
    provider = yaml.safe_load(
        (inside[str(provisioning / "dashboards")] / "provider.yaml").read_text()
    )
    if {each["options"]["path"] for each in provider["providers"]} != {
        str(provisioning / "dashboards")
    }:
        yield "Grafana looks for dashboards elsewhere"


CHECKS: dict[str, Callable[[Compose], Iterator[str]]] = {
    each.__name__: each
    for each in (settings, open_ports, confined, sizes, files, images, monitored)
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_wrong(variant: str, check: str) -> None:
    assert list(CHECKS[check](composed(variant))) == []


def test_with_tls_strangers_are_kept_out() -> None:
    accepted = settings_of(composed("tls")["services"]["captionserve"])
    assert accepted is not None
    assert not accepted.insecure
    assert accepted.tls_certificate
    assert accepted.tokens


def test_compose_refuses_a_field_that_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text("services: {a: {image: a, memlimit: 3g}}\n")
    ended = run("docker-compose", "--file", path, "config")
    assert ended.returncode != 0
    assert "memlimit" in said(ended)


def of(name: str, **changed: Any) -> Callable[[Compose], object]:
    """A mistake in a service."""
    return lambda compose: compose["services"][name].update(changed)


def variable(name: str, value: str) -> Callable[[Compose], object]:
    return lambda compose: compose["services"]["captionserve"]["environment"].update(
        {f"{VARIABLE_PREFIX}{name}": value}
    )


def without_volume(name: str, number: int) -> Callable[[Compose], object]:
    return lambda compose: compose["services"][name]["volumes"].pop(number)


MUTATIONS: tuple[tuple[str, str, Callable[[Compose], object]], ...] = (
    ("settings", "plain", variable("DRAIN", "65")),
    ("settings", "plain", variable("INSECURE", "false")),
    ("settings", "plain", variable("METRICS_LISTEN", "127.0.0.1:9002")),
    ("settings", "tls", variable("TOKENS", "")),
    ("settings", "plain", of("captionserve", command=["export"])),
    ("open_ports", "plain", of("captionserve", ports=[{"target": 9000}])),
    ("open_ports", "plain", of("prometheus", ports=[{"target": 9090}])),
    ("open_ports", "tls", of("captionserve", ports=[{"target": 9002, "host_ip": "127.0.0.1"}])),
    ("confined", "plain", of("captionserve", read_only=False)),
    ("confined", "plain", of("captionserve", tmpfs=["/tmp:size=256m"])),
    ("confined", "plain", of("captionserve", tmpfs=["/tmp:exec"])),
    ("confined", "plain", of("captionserve", user="root")),
    ("confined", "plain", of("captionserve", privileged=True)),
    ("confined", "plain", of("grafana", cap_drop=[])),
    ("confined", "plain", of("prometheus", security_opt=[])),
    ("confined", "tls", lambda c: c["services"]["captionserve"]["volumes"][1].pop("read_only")),
    ("sizes", "plain", of("captionserve", shm_size="67108864")),
    ("sizes", "plain", of("captionserve", mem_limit="1073741824")),
    ("sizes", "plain", of("captionserve", stop_grace_period="10s")),
    ("sizes", "plain", variable("DRAIN_SECONDS", "30")),
    ("files", "plain", variable("MODEL_REPOSITORY", "/srv")),
    ("files", "tls", without_volume("captionserve", 1)),
    (
        "files",
        "plain",
        lambda c: c["services"]["prometheus"]["volumes"][1].update(source="/x/a.yaml"),
    ),
    ("images", "plain", of("grafana", image="grafana/grafana:latest")),
    ("images", "plain", of("prometheus", image="prom/prometheus")),
    ("images", "plain", of("captionserve", image="captionserve-server:0.0.9")),
    ("monitored", "plain", without_volume("prometheus", 0)),
    ("monitored", "plain", without_volume("prometheus", 1)),
    ("monitored", "plain", without_volume("grafana", 0)),
    ("monitored", "plain", variable("METRICS_LISTEN", "0.0.0.0:9102")),
)


def test_every_check_has_mutations() -> None:
    assert {check for check, _, _ in MUTATIONS} == set(CHECKS)


@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_a_mistake_is_found_by_its_check(number: int) -> None:
    check, variant, mistake = MUTATIONS[number]
    compose = composed(variant)
    mistake(compose)
    assert list(CHECKS[check](compose)) != []
