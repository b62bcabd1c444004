"""Whether the settings of a manifest are settings, and say what its ports and mounts say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from captionserve_server.cli.settings_options import flag, variable
from captionserve_server.settings import VARIABLE_PREFIX, Settings
from pydantic import ValidationError

from tests.deploy.objects import Manifests
from tests.deploy.tools import ROOT

KNOWN_VARIABLES = {variable(name): name for name in Settings.model_fields}
KNOWN_FLAGS = {flag(name) for name in Settings.model_fields}
# Settings that name a file or folder, which must be mounted.
FILES = ("model_repository", "tls_certificate", "tls_key", "tls_client_ca", "tokens")
# Ports of the container to the settings that say where is listened.
LISTENS = {"grpc": "listen", "health": "health_listen", "metrics": "metrics_listen"}
GUIDE = ROOT / "docs" / "deploying.md"
# Files of a Secret or ConfigMap that a command in the guide makes.
_MADE = re.compile(
    r"kubectl[^\n]* create (secret generic|secret tls|configmap) (\S+)((?:.|\\\n)*?)$", re.M
)
_FROM_FILE = re.compile(r"--from-file=(?:(\S+?)=)?(\S+)")


def settings_of(manifests: Manifests) -> Settings | None:
    """The settings that a pod would have; None if they are none."""
    given = {
        KNOWN_VARIABLES[name]: value
        for name, value in manifests.variables.items()
        if name in KNOWN_VARIABLES
    }
    try:
        # The one path that is looked at, which is there in the container only.
        return Settings.model_validate(given | {"model_repository": ROOT})
    except ValidationError:
        return None


def settings(manifests: Manifests) -> Iterator[str]:
    """Every variable and flag exists, and together they are accepted."""
    for name in manifests.variables:
        if name.startswith(VARIABLE_PREFIX) and name not in KNOWN_VARIABLES:
            yield f"{name} is no setting"
    arguments = manifests.container.get("args", [])
    if arguments[:1] != ["serve"]:
        yield f"the command is {arguments}"
    for argument in arguments[1:]:
        if argument.startswith("--") and argument.partition("=")[0] not in KNOWN_FLAGS:
            yield f"{argument} is no flag"
    if settings_of(manifests) is None:
        yield "the settings are not accepted"


def guarded(manifests: Manifests) -> Iterator[str]:
    """Strangers are kept out, but in the overlay for trying out."""
    said = settings_of(manifests)
    if said is not None and said.insecure and manifests.name != "dev":
        yield "strangers may call"


def files(manifests: Manifests) -> Iterator[str]:
    """Files that settings name lie in volumes which have them, and which show when they change."""
    said = settings_of(manifests)
    if said is None:
        return
    for name in FILES:
        path = manifests.variables.get(variable(name), "")
        if not path:
            continue
        found = manifests.volume_at(path)
        if found is None:
            yield f"{path} is not mounted"
            continue
        mount, volume = found
        if "subPath" in mount:
            yield f"{path} is mounted by subPath and never changes"
        if "secret" in volume:
            secret = volume["secret"]
            keys = made_by_hand().get(("Secret", secret["secretName"]), set())
            if PurePosixPath(path).name not in keys:
                yield f"{path} is none of the files of {secret['secretName']}: {sorted(keys)}"
            if secret.get("defaultMode") != 0o440:
                yield f"{path} can be read by others than the pod's group, or not by that"
        elif name != "model_repository":
            yield f"{path} is not from a Secret"


def ports(manifests: Manifests) -> Iterator[str]:
    """The container's ports are those that are listened on; probes ask the one for health."""
    said = settings_of(manifests)
    if said is None:
        return
    listened = {}
    for name, setting in LISTENS.items():
        address = getattr(said, setting)
        if address is None:
            yield f"{flag(setting)} is not set"
            continue
        host, _, port = address.rpartition(":")
        listened[name] = int(port)
        if host not in {"0.0.0.0", "[::]"}:
            yield f"{flag(setting)} {address} cannot be reached from outside the pod"
    named = {each["name"]: each["containerPort"] for each in manifests.container["ports"]}
    if named != listened:
        yield f"the container has the ports {named}, and {listened} are listened on"
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = manifests.container.get(kind, {}).get("grpc", {}).get("port")
        if port != listened.get("health"):
            yield f"{kind} asks port {port}, and health is at {listened.get('health')}"


def made_by_hand() -> dict[tuple[str, str], set[str]]:
    """What the guide has people make, by kind and name, and the files in it."""
    made: dict[tuple[str, str], set[str]] = {}
    text = GUIDE.read_text(encoding="utf-8").replace("\\\n", " ")
    for kind, name, rest in _MADE.findall(text):
        if kind == "secret tls":
            keys = {"tls.crt", "tls.key"}
        else:
            keys = {key or PurePosixPath(path).name for key, path in _FROM_FILE.findall(rest)}
        made["ConfigMap" if kind == "configmap" else "Secret", name] = keys
    return made
