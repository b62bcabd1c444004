"""A load test from beginning to end: one rate after the other, each of an idle service."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from captionserve import CaptionClient, GenerationOptions

from captionserve_server.bench.images import bench_images
from captionserve_server.bench.load.arrivals import poisson_arrivals
from captionserve_server.bench.load.calls import Offer, Service, generator
from captionserve_server.bench.load.figures import Verdict, figures_of
from captionserve_server.bench.load.knee import sweep
from captionserve_server.bench.load.replicas import launched_replicas, target_of
from captionserve_server.bench.load.report import Plan, Report, Row
from captionserve_server.bench.machine import machine_facts
from captionserve_server.bench.processes import (
    family_cpu_seconds,
    family_memory_mib,
    machine_cpu_seconds,
)

# Of the rate that a lone caller reaches: what a sweep begins with.
_FIRST_SHARE = 0.5
_WARM_UP_SECONDS = 120.0
# How long and how often to look whether others are busy, how long to wait for them, and how often
# a rate is measured when they were.
_LOOK_SECONDS = 3.0
_QUIET_SECONDS = 600.0
_ATTEMPTS = 4


def load_test(plan: Plan, service: Service | None, progress: Callable[[str], None]) -> Report:
    """Offer the plan's rates, or those of a sweep.

    Args:
        plan: what to ask, and how.
        service: whom; None starts what the plan says.
        progress: told what begins.

    Raises:
        TooFewCoresError: if the plan's replicas cannot have the cores they want.
        LaunchError: if one does not start.
        CaptionError: if a call of the warm-up fails.
    """
    images = bench_images(plan.images)
    with ExitStack() as stack:
        pids: list[int] = []
        if service is None:
            assert plan.repository is not None, "either is given"
            progress("starting Triton and the gateway")
            started = stack.enter_context(
                launched_replicas(plan.repository, plan.replicas, plan.cores_each)
            )
            # Triton and its models are the gateway's descendants.
            pids = [each.pids["gateway"] for each in started]
            each_service = [Service(each.grpc) for each in started]
            service = Service(target_of(started))
        else:
            each_service = [service]
        progress("warming up")
        report = _warmed_up(plan, each_service, images)
        offer = stack.enter_context(
            generator(
                service,
                images,
                plan.options,
                connections=plan.connections,
                deadline=plan.deadline_seconds,
            )
        )

        def holds(rate: float) -> bool:
            progress(f"{rate:g} images/s for {plan.seconds:g} s")
            report.rows.append(_undisturbed(plan, pids, lambda: _row(plan, rate, offer, pids)))
            return report.verdict(report.rows[-1]) is Verdict.HELD

        if plan.rates:
            for rate in plan.rates:
                holds(rate)
        else:
            sweep(float(f"{_FIRST_SHARE * 1e3 / report.lone_ms:.2g}"), holds)
    return report


def _undisturbed(plan: Plan, pids: Sequence[int], measure: Callable[[], Row]) -> Row:
    """A rate as it is measured while others leave the machine alone, or after a few attempts."""
    if plan.most_other_cores is None:
        return measure()
    for _ in range(_ATTEMPTS):
        _wait_for_quiet(plan.most_other_cores, pids)
        row = measure()
        if row.other_cores is not None and row.other_cores <= plan.most_other_cores:
            break
    return row


def _wait_for_quiet(most_cores: float, pids: Sequence[int]) -> None:
    """Until all but these services and their descendants take no more; bounded."""

    def others() -> float:
        return machine_cpu_seconds() - sum(map(family_cpu_seconds, pids))

    end = time.monotonic() + _QUIET_SECONDS
    while time.monotonic() < end:
        before = others()
        time.sleep(_LOOK_SECONDS)
        if others() - before <= most_cores * _LOOK_SECONDS:
            return


def _row(plan: Plan, rate: float, offer: Offer, pids: Sequence[int]) -> Row:
    arrivals = poisson_arrivals(
        rate,
        plan.seconds,
        images=plan.images,
        cached_share=plan.cached_share,
        seed=plan.seed,
    )
    machine, services = machine_cpu_seconds(), sum(map(family_cpu_seconds, pids))
    offered = offer(arrivals)
    machine = machine_cpu_seconds() - machine
    services = sum(map(family_cpu_seconds, pids)) - services
    figures = figures_of(rate, offered.calls, begin=plan.lead_in_seconds, end=plan.seconds)
    others = machine - services - offered.cpu_seconds
    return Row(
        figures,
        generator_cores=offered.cpu_seconds / offered.seconds,
        service_cores=services / offered.seconds if pids else None,
        other_cores=others / offered.seconds if pids else None,
        memory_mib=[family_memory_mib(pid) for pid in pids],
    )


def _warmed_up(plan: Plan, services: Sequence[Service], images: Sequence[bytes]) -> Report:
    """Ask each service for each image, one after the other; it remembers those to be repeated then.

    The typed client does it, since it says what is wrong with a call.
    """
    options = GenerationOptions(**plan.options)  # type: ignore[arg-type]
    seconds: list[float] = []
    for service in services:
        with CaptionClient(
            service.target,
            credentials=service.credentials(),
            token=service.token,
            timeout=_WARM_UP_SECONDS,
        ) as client:
            for image in images:
                begin = time.monotonic()
                client.caption(image, options, bypass_cache=True)
                seconds.append(time.monotonic() - begin)
                if plan.cached_share:
                    client.caption(image, options)
            newest = client.models().models[0]
    model = {
        "version": newest.version,
        "precision": newest.precision,
        "image_size": newest.image_size,
    }
    return Report(plan, machine_facts(), model, 1e3 * statistics.median(seconds))
