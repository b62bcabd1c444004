"""What a service's metrics say, as Prometheus reads them."""

from __future__ import annotations

import math
import urllib.request

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def samples(address: str, name: str, **labels: str) -> list[Sample]:
    """The samples of a name at HOST:PORT that have these labels."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return [
            sample
            for family in families
            for sample in family.samples
            # The parser adds it to the name of a counter of Triton's, which has none.
            if sample.name.removesuffix("_total") == name.removesuffix("_total")
            and labels.items() <= sample.labels.items()
        ]


def total(address: str, name: str, **labels: str) -> float:
    """Their sum."""
    return math.fsum(each.value for each in samples(address, name, **labels))
