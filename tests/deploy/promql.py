"""What a query asks for: enough of PromQL to find metrics, labels and their values.

promtool says whether a query is one; nothing but this says whether it asks for what there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import grpc
from captionserve.v1 import caption_pb2
from captionserve_server.gateway.caption_service import SERVICE_NAME

# What Prometheus puts on every series, here and in a cluster.
TARGET_LABELS = frozenset({"job", "instance", "namespace", "pod", "le"})
# Metrics that others make, with those of their labels that are used.
FOREIGN: Mapping[str, frozenset[str]] = {
    "up": frozenset(),
    "container_memory_working_set_bytes": frozenset({"container"}),
    "container_spec_memory_limit_bytes": frozenset({"container"}),
}
_METHODS = {
    method.name
    for method in caption_pb2.DESCRIPTOR.services_by_name[SERVICE_NAME.rpartition(".")[2]].methods
} | {"CaptionMany.item"}
# Labels whose values are known.
_VALUES = {"code": {code.name for code in grpc.StatusCode}, "method": _METHODS}

_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_SERIES = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(\{[^{}]*\})?\s*(\()?")
_MATCHER = re.compile(r'([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)\s*("(?:[^"\\]|\\.)*")')
_WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
_RANGE = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True)
class Asked:
    """One metric that a query asks for.

    Attributes:
        name: of the series.
        matchers: its labels with the values that are asked for.
    """

    name: str
    matchers: tuple[tuple[str, str], ...]


def asked_for(query: str) -> tuple[list[Asked], set[str]]:
    """The metrics of a query, and the labels that it groups by."""
    groups = {
        label.strip()
        for names in _GROUPING.findall(query)
        for label in names.split(",")
        if label.strip()
    }
    query = _RANGE.sub("", _GROUPING.sub(" ", query))
    # An operator such as `sum` may now stand before what it sums; its parenthesis still follows.
    found = []
    for name, matchers, parenthesis in _SERIES.findall(_outside_texts(query)):
        if parenthesis or name.lower() in _WORDS:
            continue
        found.append(Asked(name, tuple(_restored(query, matchers))))
    return found, groups


def unknown_in(query: str, metrics: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """What a query asks for that there is not.

    Args:
        query: of PromQL.
        metrics: names of series, with their labels.
    """
    known = {**metrics, **FOREIGN}
    asked, groups = asked_for(query)
    if not asked:
        yield f"nothing is asked for by {query}"
    labels = set(TARGET_LABELS)
    for each in asked:
        if each.name not in known:
            yield f"there is no metric {each.name}"
            continue
        own = TARGET_LABELS | known[each.name]
        labels |= own
        for label, value in each.matchers:
            if label not in own:
                yield f"{each.name} has no label {label}"
            for alternative in value.split("|"):
                if label in _VALUES and alternative not in _VALUES[label]:
                    yield f"no {label} is {alternative}"
    for label in groups - labels:
        yield f"grouped by {label}, which is no label there"


def _outside_texts(query: str) -> str:
    """A query with the texts in it numbered, so that nothing in them is taken for a name."""
    texts = iter(range(len(query)))
    return _TEXT.sub(lambda _: f'"{next(texts)}"', query)


def _restored(query: str, matchers: str) -> Iterator[tuple[str, str]]:
    texts = _TEXT.findall(query)
    for label, numbered in _MATCHER.findall(matchers):
        yield label, texts[int(numbered.strip('"'))].strip('"')
