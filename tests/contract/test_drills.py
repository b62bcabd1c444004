"""docs/operations.md names a test for each drill; it is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NAMED = re.findall(
    r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "operations.md").read_text()
)


def test_drills_name_their_tests() -> None:
    assert len(NAMED) >= 10


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)))
def test_a_drill_is_a_test(path: str, name: str) -> None:
    text = (ROOT / path).read_text()
    assert f"def {name or 'test_'}" in text
