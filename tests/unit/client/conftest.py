"""Fixtures of the client's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.client.caption_server import RecordingServicer, caption_server


@pytest.fixture
def server() -> Iterator[tuple[str, RecordingServicer]]:
    with caption_server() as running:
        yield running
