"""Give readers that are far apart their own copy of a value that is never written to memory.

A loop whose result only loops read is computed inside its readers. Inductor fuses two readers
that share such a value into one kernel even when library calls lie between them, and everything
the two read and write is then alive at once. With a copy each there is nothing to share.

Runs under a budget only. Never pays in time: each copy is computed once more, in registers.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from memopt.graph import INLINED, is_recomputable, packet_name, stretches
from memopt.pipeline import PassContext


@dataclass(frozen=True)
class UnshareReaders:
    """``v = f(x); a(v); mm(...); b(v)`` -> ``a(f(x)); mm(...); b(f(x))``."""

    name: ClassVar[str] = "unshare_readers"
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, graph: fx.Graph, ctx: PassContext) -> int:
        if ctx.config.memory_budget.kind == "none":
            return 0
        stretch = stretches(graph)
        copies = 0
        for node in reversed(list(graph.nodes)):
            if not _may_be_copied(node):
                continue
            readers: dict[int, list[fx.Node]] = {}
            for user in node.users:
                readers.setdefault(stretch[user], []).append(user)
            for at in sorted(readers)[1:]:
                with graph.inserting_before(min(readers[at])):
                    copy = graph.node_copy(node)
                stretch[copy] = at
                for user in readers[at]:
                    user.replace_input_with(node, copy)
                copies += 1
        return copies


def _may_be_copied(node: fx.Node) -> bool:
    """A concatenation may be written whatever reads it."""
    is_cat = packet_name(node.target) == "aten.cat"
    return INLINED in node.meta and is_recomputable(node) and not is_cat
