"""The checks of rendered manifests: each takes an overlay, and yields what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.deploy.checks import configuration, lifecycle, pods, references, scaling, traffic
from tests.deploy.checks.custom_kinds import custom_kinds
from tests.deploy.objects import Manifests

Check = Callable[[Manifests], Iterator[str]]

CHECKS: dict[str, Check] = {
    each.__name__: each
    for each in (
        configuration.settings,
        configuration.guarded,
        configuration.files,
        configuration.ports,
        references.names,
        references.selectors,
        references.service_ports,
        lifecycle.starting,
        lifecycle.probes,
        lifecycle.ending,
        lifecycle.rollout,
        pods.restricted,
        pods.same_user,
        pods.isolated,
        pods.resources,
        pods.writable_places,
        pods.memory,
        pods.images,
        scaling.scaling,
        traffic.network,
        traffic.streams,
        custom_kinds,
    )
}


def wrong(manifests: Manifests) -> list[str]:
    """All that any check finds, each with the check's name."""
    return [f"{name}: {what}" for name, check in CHECKS.items() for what in check(manifests)]
