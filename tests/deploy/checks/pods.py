"""What a pod may do and has: Pod Security, resources, memory, the image."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

from captionserve_server.export.repository import static_repository
from captionserve_server.settings import Settings
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.deploy.checks.configuration import settings_of
from tests.deploy.objects import Manifests, Object
from tests.deploy.tools import ROOT

MEGABYTE = 2**20
# docs/deploying.md has both formulas and where the figures are from.
_SHARED_FIXED_MEGABYTES = 16
_SHARED_MESSAGES = 4
_SHARED_SLOT_MEGABYTES = 2
_MODEL_MEGABYTES = 1100
_SMALL_MODEL_MEGABYTES = 400
COPIES_OF_REQUESTS = 8

_ALLOWED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",  # Since 1.33.
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_IMAGE = re.compile(r"[a-z0-9][a-z0-9./:_-]*@sha256:[0-9a-f]{64}")
_NO_DIGEST = "0" * 64
_VERSION = re.search(
    r'^version = "(.+)"$', (ROOT / "server_tools" / "pyproject.toml").read_text(), re.MULTILINE
)
assert _VERSION
VERSION = _VERSION[1]
_UNITS = {"m": Decimal("0.001"), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30)}


def quantity(text: str | int) -> Decimal:
    """A quantity of Kubernetes as a number."""
    match = re.fullmatch(r"([0-9.]+)(m|Ki|Mi|Gi)?", str(text))
    assert match, f"{text} is not a quantity that is used here"
    return Decimal(match[1]) * _UNITS.get(match[2], Decimal(1))


def restricted(manifests: Manifests) -> Iterator[str]:
    """The namespace enforces the standard `restricted`, and every container meets it."""
    for namespace in manifests.of("Namespace"):
        labels = namespace["metadata"].get("labels", {})
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce `restricted`"
    if not manifests.of("Namespace"):
        yield "no namespace says what is enforced"
    pod = manifests.pod
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name} is set"
    for volume in pod.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= _ALLOWED_VOLUMES:
            yield f"volume {volume['name']} is of a kind that is not allowed: {kinds}"
    for container in manifests.all_containers:
        for wrong in _unrestricted(pod.get("securityContext", {}), container):
            yield f"container {container['name']}: {wrong}"


def _unrestricted(of_pod: Object, container: Object) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = {**of_pod, **own}
    if both.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if both.get("runAsUser") == 0:
        yield "runs as root"
    if both.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        yield "has no seccomp profile"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if own.get("privileged"):
        yield "is privileged"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "keeps capabilities"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "has more capabilities"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "has a port of its node"
    # Not asked for by `restricted`, but by us.
    if own.get("readOnlyRootFilesystem") is not True:
        yield "can write to its root"


def same_user(manifests: Manifests) -> Iterator[str]:
    """The pod runs as the image's user, who owns nothing, and files are for that group."""
    context = manifests.pod.get("securityContext", {})
    users = {context.get(name) for name in ("runAsUser", "runAsGroup", "fsGroup")}
    if len(users) != 1 or None in users:
        yield "runAsUser, runAsGroup and fsGroup differ"
    dockerfile = ROOT / "docker" / "Dockerfile"
    if dockerfile.exists():
        for user in re.findall(r"^USER (\S+)", dockerfile.read_text(), re.MULTILINE):
            if user != f"{context.get('runAsUser')}:{context.get('runAsGroup')}":
                yield f"the image's user is {user}"


def isolated(manifests: Manifests) -> Iterator[str]:
    """The pod has no credentials of Kubernetes, and no variables of its Services."""
    if manifests.pod.get("automountServiceAccountToken") is not False:
        yield "the pod has a token for Kubernetes"
    if manifests.pod.get("enableServiceLinks") is not False:
        yield "Services put variables beside ours"


def resources(manifests: Manifests) -> Iterator[str]:
    """Every container has requests = limits, in whole cores."""
    for container in manifests.all_containers:
        said = container.get("resources", {})
        requests, limits = said.get("requests", {}), said.get("limits", {})
        where = f"container {container['name']}"
        if requests != limits:
            yield f"{where}: requests and limits differ"
        if not {"cpu", "memory"} <= set(limits):
            yield f"{where}: cpu and memory are not both bounded"
        elif quantity(limits["cpu"]) % 1:
            yield f"{where}: {limits['cpu']} are not whole cores"


def writable_places(manifests: Manifests) -> Iterator[str]:
    """/tmp and /dev/shm are there, bounded and of the right kind; all else is read only."""
    for path, medium in (("/tmp", None), ("/dev/shm", "Memory")):
        found = manifests.volume_at(path)
        if found is None or "emptyDir" not in found[1] or found[0]["mountPath"] != path:
            yield f"{path} is not an emptyDir"
            continue
        said = found[1]["emptyDir"] or {}
        if said.get("medium") != medium:
            yield f"{path} is of the medium {said.get('medium')}"
        if "sizeLimit" not in said:
            yield f"{path} is not bounded"
    for mount in manifests.container["volumeMounts"]:
        volume = next(v for v in manifests.pod["volumes"] if v["name"] == mount["name"])
        # An image volume is read-only whatever is said.
        if not {"emptyDir", "image"} & set(volume) and mount.get("readOnly") is not True:
            yield f"{mount['mountPath']} can be written to"
        claim = volume.get("persistentVolumeClaim")
        if claim is not None and claim.get("readOnly") is not True:
            yield f"the claim {claim['claimName']} is mounted to be written to"


def memory(manifests: Manifests) -> Iterator[str]:
    """/dev/shm and the memory limit are as large as the formulas in docs/deploying.md want."""
    settings = settings_of(manifests)
    found = manifests.volume_at("/dev/shm")
    if settings is None or found is None:
        return  # Others say so.
    size = quantity((found[1].get("emptyDir") or {}).get("sizeLimit", 0))
    if size < shared_megabytes(settings) * MEGABYTE:
        yield f"/dev/shm needs {shared_megabytes(settings)} MiB"
    limit = quantity(manifests.container["resources"]["limits"]["memory"])
    needed = memory_megabytes(settings, small_model=manifests.name == "dev")
    if limit < needed * MEGABYTE:
        yield f"the limit must be {needed} MiB"
    if size >= limit / 2:
        # Regions that are left by killed processes are found there and count, too.
        yield "/dev/shm may fill half of the memory"


def shared_megabytes(settings: Settings) -> int:
    """How large /dev/shm must be."""
    return (
        _SHARED_FIXED_MEGABYTES
        + _SHARED_MESSAGES * settings.max_message_megabytes
        + _SHARED_SLOT_MEGABYTES * decoder_slots()
    )


def memory_megabytes(settings: Settings, *, small_model: bool = False) -> int:
    """How large the memory limit must be, for the full-size model in int8 or the demo's."""
    return (
        (_SMALL_MODEL_MEGABYTES if small_model else _MODEL_MEGABYTES)
        + settings.cache_megabytes
        + settings.decode_megabytes
        + COPIES_OF_REQUESTS * settings.max_request_megabytes
    )


def decoder_slots() -> int:
    """How many captions the decoder works on at once."""
    text = (static_repository() / "decoder" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    return int(config.parameters["slots"].string_value)


def images(manifests: Manifests) -> Iterator[str]:
    """Every image has a digest, and the service's is of this version."""
    for reference in _references(manifests):
        if not _IMAGE.fullmatch(reference):
            yield f"{reference} has no digest"
    version = f":{VERSION}@"
    if version not in manifests.container["image"]:
        yield f"{manifests.container['image']} is not of version {VERSION}"
    label = manifests.pod_labels.get("app.kubernetes.io/version")
    if label != VERSION:
        yield f"the pods are labelled with version {label}"


def placeholders(manifests: Manifests) -> Iterator[str]:
    """Images whose digest is still the placeholder; for a release only."""
    for reference in _references(manifests):
        if reference.endswith(_NO_DIGEST):
            yield f"{reference} has the placeholder for a digest"


def _references(manifests: Manifests) -> Iterator[str]:
    for container in manifests.all_containers:
        yield container["image"]
    for volume in manifests.pod.get("volumes", []):
        if "image" in volume:
            yield volume["image"]["reference"]
