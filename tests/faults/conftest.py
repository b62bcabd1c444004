"""One service for all faults that it shall survive without being started anew for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.served import Served, assert_ended_well, serving

CHECKPOINT = "projected"
MOST_STREAMS = 32


@pytest.fixture(scope="session")
def impatient(
    model_repository: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A service that takes few streams of a connection, and soon gives up on who is silent."""
    arguments = (
        *("--max-streams-per-connection", str(MOST_STREAMS)),
        *("--handshake-seconds", "2", "--keepalive-seconds", "2", "--max-restarts", "100"),
    )
    folder = tmp_path_factory.mktemp("impatient")
    with serving(model_repository(CHECKPOINT), folder, *arguments) as served:
        yield served
        assert_ended_well(served)
