"""What requests take in docs/deploying.md is what was measured, and pods have room for it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from captionserve_server.settings import Settings

from tests.deploy.checks.pods import COPIES_OF_REQUESTS

DOCS = Path(__file__).parent.parent.parent / "docs"
CASES = json.loads((DOCS / "measurements" / "request-memory.json").read_text())["cases"]


def test_the_table_has_the_measured_cases() -> None:
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) MB \| (\d+) \| (\d+) \| (\d+) \|$",
        (DOCS / "deploying.md").read_text(),
        re.MULTILINE,
    )
    names = ("callers", "megabytes", "request_megabytes", "more_mib", "kept_mib")
    assert [tuple(map(float, row)) for row in rows] == [
        tuple(float(case[name]) for name in names) for case in CASES
    ]


def test_the_sum_of_a_pod_is_enough_for_each() -> None:
    # The pixels of pictures that are being decoded are counted apart.
    pixels = Settings.model_fields["decode_megabytes"].default
    for case in CASES:
        assert case["more_mib"] <= COPIES_OF_REQUESTS * case["request_megabytes"] + pixels
