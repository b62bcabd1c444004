"""Rows: their names, and which are chosen."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from captionserve_server.bench.peers.system import Load
from captionserve_server.bench.rows import PeerPlan, Row, rows_of
from captionserve_server.export.precision import Precision

PLANS = [
    PeerPlan("transformers", Precision.FP32, [Load(1, "batch"), Load(8, "batch")], nullcontext),  # type: ignore[arg-type]
    PeerPlan("ours int8", Precision.INT8, [Load(4, "in flight")], nullcontext),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(
    ("load", "num_beams", "label"),
    [
        (Load(8, "batch"), 1, "peer, batch 8, greedy"),
        (Load(16, "at once"), 4, "peer, 16 at once, 4 beams"),
        (
            Load(32, "in flight", streams=12),
            4,
            "peer, 12 streams and 20 calls in flight, 4 beams",
        ),
    ],
)
def test_a_row_says_what_is_measured(load: Load, num_beams: int, label: str) -> None:
    assert Row("peer", Precision.FP32, load, num_beams).label == label


@pytest.mark.parametrize(
    ("num_beams", "patterns", "labels"),
    [
        (
            (1, 4),
            ["*"],
            [
                "transformers, batch 1, greedy",
                "transformers, batch 8, greedy",
                "ours int8, 4 in flight, greedy",
                "transformers, batch 1, 4 beams",
                "transformers, batch 8, 4 beams",
                "ours int8, 4 in flight, 4 beams",
            ],
        ),
        (
            (4,),
            ["ours", "*, batch 8"],
            ["transformers, batch 8, 4 beams", "ours int8, 4 in flight, 4 beams"],
        ),
        ((1,), ["nobody"], []),
    ],
)
def test_rows_are_chosen_by_the_beginning_of_their_labels(
    num_beams: tuple[int, ...], patterns: list[str], labels: list[str]
) -> None:
    assert [row.label for row in rows_of(PLANS, num_beams, patterns)] == labels
