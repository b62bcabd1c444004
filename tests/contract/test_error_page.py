"""The table of errors has every error there is, with its code."""

from __future__ import annotations

from pathlib import Path

from captionserve_server.core.errors import all_error_types
from captionserve_server.gateway.status import CODES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"


def test_the_table_of_errors_is_the_codes() -> None:
    lines = PAGE.read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    said = {(code.strip(), reason.strip()) for _, code, reason in rows[2:]}
    assert said == {(CODES[each].name, each.reason) for each in all_error_types()}
