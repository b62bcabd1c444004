"""What kustomize makes of an overlay, as objects that checks read and mutations change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

Object = dict[str, Any]

_STEP = re.compile(r"([^.\[\]]+)|\[([^\]]+)\]")


@dataclass
class Manifests:
    """All objects of an overlay.

    Attributes:
        name: of the overlay.
        objects: as they are applied.
    """

    name: str
    objects: list[Object]

    @classmethod
    def parse(cls, name: str, text: str) -> Manifests:
        """Read what kustomize has written."""
        return cls(name, [each for each in yaml.safe_load_all(text) if each])

    def of(self, kind: str) -> list[Object]:
        """All objects of a kind."""
        return [each for each in self.objects if each["kind"] == kind]

    def named(self, kind: str, name: str) -> Object | None:
        """The object of this kind and name."""
        found = [each for each in self.of(kind) if each["metadata"]["name"] == name]
        return found[0] if found else None

    @property
    def deployment(self) -> Object:
        """The one Deployment."""
        (deployment,) = self.of("Deployment")
        return deployment

    @property
    def pod(self) -> Object:
        """The specification of its pods."""
        pod: Object = self.deployment["spec"]["template"]["spec"]
        return pod

    @property
    def pod_labels(self) -> Mapping[str, str]:
        """The labels of its pods."""
        labels: dict[str, str] = self.deployment["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def container(self) -> Object:
        """The container of the service."""
        (container,) = [each for each in self.pod["containers"] if each["name"] == "captionserve"]
        found: Object = container
        return found

    @property
    def all_containers(self) -> list[Object]:
        """Those, and whatever runs before and beside them."""
        kinds = ("initContainers", "containers", "ephemeralContainers")
        return [each for kind in kinds for each in self.pod.get(kind, [])]

    @property
    def variables(self) -> dict[str, str]:
        """The environment of the service, as its ConfigMap and its container say it."""
        said: dict[str, str] = {}
        for source in self.container.get("envFrom", []):
            map_ = self.named("ConfigMap", source["configMapRef"]["name"])
            said |= {} if map_ is None else map_["data"]
        return said | {each["name"]: each["value"] for each in self.container.get("env", [])}

    def volume_at(self, path: str) -> tuple[Object, Object] | None:
        """The mount that a path in the container lies in, and its volume; the innermost."""
        mounts = [
            mount
            for mount in self.container.get("volumeMounts", [])
            if path == mount["mountPath"] or path.startswith(mount["mountPath"].rstrip("/") + "/")
        ]
        if not mounts:
            return None
        mount = max(mounts, key=lambda each: len(each["mountPath"]))
        volumes = [each for each in self.pod.get("volumes", []) if each["name"] == mount["name"]]
        return (mount, volumes[0]) if volumes else None


def selects(selector: Mapping[str, str] | None, labels: Mapping[str, str]) -> bool:
    """Whether labels match a selector; one without labels is none, and matches nothing here."""
    return bool(selector) and set((selector or {}).items()) <= set(labels.items())


def find(inside: Any, path: str) -> tuple[Any, Any]:
    """The dict or list that a path ends in, and the key or index there.

    Args:
        inside: an object.
        path: such as `spec.containers[captionserve].args[0]`: items of lists by name or index.
    """
    steps = [key or index for key, index in _STEP.findall(path)]
    for step in steps[:-1]:
        inside = inside[_key(inside, step)]
    return inside, _key(inside, steps[-1])


def _key(inside: Any, step: str) -> Any:
    if not isinstance(inside, list):
        # Keys of labels have dots, which are written as slashes are: ~.
        return step.replace("~", ".")
    if step.isdecimal():
        return int(step)
    return next(i for i, each in enumerate(inside) if each.get("name") == step)


def each_text(inside: Any) -> Iterator[str]:
    """All texts in an object."""
    if isinstance(inside, dict):
        for value in inside.values():
            yield from each_text(value)
    elif isinstance(inside, list):
        for value in inside:
            yield from each_text(value)
    elif isinstance(inside, str):
        yield inside
