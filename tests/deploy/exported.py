"""What a running gateway exports, read as Prometheus reads it."""

from __future__ import annotations

import asyncio
import functools
import urllib.request

from captionserve.v1 import caption_pb2
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.gateway.harness import gateway_setup, request_of


@functools.cache
def exported_metrics() -> dict[str, frozenset[str]]:
    """Each series' name, such as those of a histogram's buckets, with the names of its labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(asyncio.run(_page())):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return {name: frozenset(labels) for name, labels in found.items()}


async def _page() -> str:
    async with gateway_setup(metrics_listen="127.0.0.1:0") as setup:
        # A metric with labels has no series before it is used.
        await setup.stub.Caption(request_of())
        await setup.stub.GetModels(caption_pb2.GetModelsRequest())
        return await asyncio.to_thread(_read, setup.gateway.metrics_address)


def _read(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
        return text
