"""What earlier graphs of the same step hold while a later one is compiled.

A step with graph breaks, or with several compiled modules, is several graphs that share one
budget. While graph 2 is being compiled, graph 1 has run forward and holds its saved tensors and
outputs until its backward runs: graph 2 must plan with what is left.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from memopt._torch import pytree


@dataclass(frozen=True)
class Entry:
    """One forward whose backward is still to come.

    Attributes:
        node: its autograd node, which dies or is emptied with what it holds.
        held_bytes: its saved tensors and outputs.
        most_held_bytes: the same, if a larger budget let it keep everything.
        backward_peak_bytes: the peak of its own backward, as planned.
    """

    node: "weakref.ref[Any]"
    held_bytes: int
    most_held_bytes: int
    backward_peak_bytes: int


@dataclass(frozen=True)
class Crowded:
    """What to do when too many runs of one graph hold what their backward needs.

    Attributes:
        room: how many may.
        warn: is told how many do.
    """

    room: int
    warn: Callable[[int], None]


@dataclass
class Ledger:
    """Forwards whose backward has not run yet."""

    _entries: list[Entry] = field(default_factory=list)

    def held_bytes(self) -> int:
        """Bytes held now; forgets those whose backward has run or was abandoned.

        What only a reference cycle keeps, such as a frame that Dynamo gave up, is released.
        """
        self._entries = [e for e in self._entries if _in_flight(e.node())]
        if self._entries:
            gc.collect()
            self._entries = [e for e in self._entries if _in_flight(e.node())]
        return sum(e.held_bytes for e in self._entries)

    def most_held_bytes(self) -> int:
        """Bytes that would be held now under a budget that is large enough for all of them."""
        return sum(e.most_held_bytes for e in self._entries if _in_flight(e.node()))

    def earlier_peak_bytes(self, gradient_bytes: int) -> int:
        """Highest backward peak of an earlier graph once a later one has left its gradients."""
        peaks = [e.backward_peak_bytes for e in self._entries if _in_flight(e.node())]
        return max(peaks) + gradient_bytes if peaks else 0

    def tracked(
        self,
        compiled: Callable[..., Any],
        held_bytes: int,
        most_held_bytes: int,
        backward_peak_bytes: int,
        crowded: Crowded | None = None,
    ) -> Callable[..., Any]:
        """``compiled``, entered here from each forward to its backward.

        Args:
            compiled: a graph.
            held_bytes: what it holds in between.
            most_held_bytes: what it holds where it keeps most.
            backward_peak_bytes: the peak of its backward.
            crowded: is told once that more runs than there is room for are under way.
        """
        nodes: list[weakref.ref[Any]] = []

        def run(*args: Any) -> Any:
            nonlocal crowded
            result = compiled(*args)
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                    self._entries = [e for e in self._entries if e.node() is not None]
                    node = weakref.ref(leaf.grad_fn)
                    entry = Entry(node, held_bytes, most_held_bytes, backward_peak_bytes)
                    self._entries.append(entry)
                    nodes[:] = [*(n for n in nodes if n() is not None), node]
                    break
            if crowded is not None and len(nodes) > crowded.room:
                nodes[:] = [n for n in nodes if _in_flight(n())]
                if len(nodes) > crowded.room:
                    crowded.warn(len(nodes))
                    crowded = None
            return result

        return run


def _in_flight(node: Any) -> bool:
    """Whether an autograd node still holds what it saved."""
    if node is None:
        return False
    try:
        return bool(node.saved_tensors is not None)
    except (AttributeError, RuntimeError):
        return False


LEDGER = Ledger()
"""One per process: graphs that share a device share its memory, whoever compiled them."""
