"""The tree of errors."""

from __future__ import annotations

from captionserve_server.core.errors import all_error_types


def test_reasons_are_unique() -> None:
    reasons = [error_type.reason for error_type in all_error_types()]
    assert len(reasons) == len(set(reasons))
