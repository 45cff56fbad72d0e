"""What a pass that computes wide values by pieces is asked, and what it is told."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import fx

from memopt.memory.liveness import Liveness

Regions = Mapping[str, Collection[str]]
"""What is or can be cut, by the name of one of its nodes: the names of those that compute it."""


@dataclass(frozen=True)
class Trial:
    """What came of one way to cut a graph.

    Attributes:
        graph: as it was before.
        pieces: the way; empty where nothing is cut.
        regions: of the graph that was planned.
        liveness: of the plan.
        limit_bytes: the bound that it is to meet; None where it is to be as low as can be.
    """

    graph: fx.Graph
    pieces: Mapping[str, int]
    regions: Regions
    liveness: Liveness
    limit_bytes: int | None


class Cutter(Protocol):
    """A pass that computes wide values by pieces.

    Attributes:
        covers: what stands before the name of a node to say what is cut for it.
    """

    name: ClassVar[str]
    covers: ClassVar[str]

    def more(self, trial: Trial) -> Mapping[str, int]:
        """The pieces to try next, by the name of a node; none where there is no more to try."""

    def __call__(self, graph: fx.Graph, pieces: Mapping[str, int]) -> Regions:
        """Cut a graph, in place; without pieces it stays as it is."""
