"""The decoder's three graphs, opened together, each counting the time spent in it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from captionserve_server.runtime import model_repository as files
from captionserve_server.runtime.graph import Array, Graph
from captionserve_server.runtime.open_graph import find_graph, open_graph


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


@dataclass(frozen=True)
class DecoderGraphs:
    """The decoder's exported graphs.

    Attributes:
        prefill: encoder states to cross-attention keys and values.
        step: one token of every row to logits.
        top: logits to the best tokens.
    """

    prefill: TimedGraph
    step: TimedGraph
    top: TimedGraph


def open_decoder(folder: Path, *, threads: int = 0, spinning: bool = True) -> DecoderGraphs:
    """Load the graphs of a version folder of `decoder`.

    Args:
        folder: the version folder.
        threads: of one run; 0 for one per core.
        spinning: see OnnxGraph.

    Raises:
        FileNotFoundError: if one of them is not there.
    """
    names = (files.PREFILL_GRAPH_FILE, files.STEP_GRAPH_FILE, files.TOP_GRAPH_FILE)
    opened = (
        open_graph(find_graph(folder, name), threads=threads, spinning=spinning) for name in names
    )
    return DecoderGraphs(*(TimedGraph(graph) for graph in opened))
