"""Several services of one model repository, each on cores of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from captionserve_server.serving.launch import launched_service
from captionserve_server.serving.ready import ReadyReport


class TooFewCoresError(ValueError):
    """There are fewer cores than the replicas are to have."""


@contextmanager
def launched_replicas(
    repository: Path, count: int, cores_each: int | None
) -> Iterator[list[ReadyReport]]:
    """Services on free loopback ports, ended on leaving.

    Args:
        repository: an exported model repository.
        count: how many.
        cores_each: cores of its own that each is held to; None holds them to none.

    Raises:
        TooFewCoresError: if there are not so many.
        LaunchError: if one does not start.
    """
    cores = sorted(os.sched_getaffinity(0))
    if cores_each is not None and count * cores_each > len(cores):
        raise TooFewCoresError(f"{count} x {cores_each} cores are wanted, {len(cores)} can be had")
    with ExitStack() as stack:
        services = []
        for number in range(count):
            own = cores
            if cores_each is not None:
                own = cores[number * cores_each : (number + 1) * cores_each]
            with _on_cores(own):
                services.append(stack.enter_context(launched_service(repository)))
        yield services


def target_of(services: list[ReadyReport]) -> str:
    """The services' addresses as one target of gRPC."""
    return "ipv4:" + ",".join(service.grpc for service in services)


@contextmanager
def _on_cores(cores: list[int]) -> Iterator[None]:
    """Processes that are started meanwhile may use these alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
