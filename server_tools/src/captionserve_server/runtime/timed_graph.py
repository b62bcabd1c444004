"""A graph that counts the time spent in it."""

from __future__ import annotations

import time
from collections.abc import Mapping

from captionserve_server.runtime.graph_step_model import Array, Graph


class TimedGraph:
    """Runs another graph.

    Attributes:
        seconds: time spent running, since the beginning.
    """

    def __init__(self, graph: Graph) -> None:
        """Count from zero."""
        self._graph = graph
        self.seconds = 0.0

    def run(
        self, inputs: Mapping[str, Array], into: Mapping[str, Array] | None = None
    ) -> list[Array]:
        """All outputs; see Graph."""
        begin = time.perf_counter()
        try:
            return self._graph.run(inputs, into)
        finally:
            self.seconds += time.perf_counter() - begin
