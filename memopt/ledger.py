"""What earlier graphs of the same step hold while a later one is compiled.

A step with graph breaks, or with several compiled modules, is several graphs that share one
budget. While graph 2 is being compiled, graph 1 has run forward and holds its saved tensors and
outputs until its backward runs: graph 2 must plan with what is left.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from memopt._torch import pytree


@dataclass
class Ledger:
    """Bytes held by forwards whose backward has not run yet, by their autograd node."""

    _entries: list[tuple["weakref.ref[Any]", int]] = field(default_factory=list)

    def held_bytes(self) -> int:
        """Bytes held now; forgets those whose backward has run or was abandoned."""
        self._entries = [(ref, n) for ref, n in self._entries if _in_flight(ref())]
        return sum(nbytes for _, nbytes in self._entries)

    def tracked(self, compiled: Callable[..., Any], nbytes: int) -> Callable[..., Any]:
        """``compiled``, noting ``nbytes`` as held from each forward to its backward."""

        def run(*args: Any) -> Any:
            result = compiled(*args)
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None:
                    self._entries = [e for e in self._entries if e[0]() is not None]
                    self._entries.append((weakref.ref(leaf.grad_fn), nbytes))
                    break
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
