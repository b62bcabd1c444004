"""What all exported graphs have in common, whatever runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

Array = NDArray[Any]


class Graph(Protocol):
    """Something that runs an exported graph."""

    def run(
        self, inputs: Mapping[str, Array], into: Mapping[str, Array] | None = None
    ) -> list[Array]:
        """All outputs, in the graph's order, which are written to the arrays of `into`, if any."""


class NamedGraph(Graph, Protocol):
    """A graph that knows the names of its inputs and outputs.

    Attributes:
        input_names: in the graph's order.
        output_names: in the graph's order.
    """

    input_names: list[str]
    output_names: list[str]
