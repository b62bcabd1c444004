"""The stand-in of Triton's utilities, for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.triton import stand_in


@pytest.fixture(autouse=True)
def _pb_utils() -> Iterator[None]:
    yield from (None for _ in stand_in.installed())
