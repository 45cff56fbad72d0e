"""The lives of storages in one half of a schedule, with and without fusion.

*Unfused*: every node allocates its result, as when the graph is interpreted. *Fused*: a pointwise
value that only loops read is never written to memory; its readers compute it from what it reads,
as Inductor does. In both a result may take the place of an input that dies, where a pass says so.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from memopt.graph import OpKind, is_scatter, overwrites, packet_name
from memopt.joint import JointGraph

# Inductor writes a value with several readers to memory once it reads more buffers than
# ``realize_reads_threshold``, and any value that reads more than ``realize_acc_reads_threshold``.
_MAX_READS_SHARED = 4
_MAX_READS = 8

Life = tuple[int, int, int]
"""A storage with the first and the last step at which it is alive."""


def storages_of(joint: JointGraph, nodes: Iterable[int]) -> set[int]:
    """The storages behind some nodes' values that the step itself allocates."""
    return {s for i in nodes for s in joint.storage_of[i] if not joint.storages[s].resident}


class Half:
    """Walks one half of a schedule and opens a life for everything it allocates.

    A storage may live twice at once: recomputing an operator with several results makes anew
    even those that were saved.

    Args:
        joint: the graph.
        order: what runs.
        start: step of the first node.
        held: nodes whose storages are alive when the half starts.
        kept: nodes whose storages are alive when it ends.
    """

    def __init__(
        self,
        joint: JointGraph,
        order: Sequence[int],
        *,
        start: int,
        held: Iterable[int],
        kept: Iterable[int],
    ) -> None:
        self.joint, self.order, self.kept = joint, order, tuple(kept)
        self.end = start + len(order)
        self.storage: list[int] = []
        self.first: list[int] = []
        self.last: list[int] = []
        self.value: dict[int, dict[int, int]] = {}
        self.reads: dict[int, set[int]] = {}  # what inlined values are computed from
        self.overwritten: list[tuple[int, int]] = []  # the step, and the life that ends before it
        self.prepare()
        shared: dict[int, int] = {}
        for i in held:
            for s in storages_of(joint, (i,)):
                if s not in shared:
                    shared[s] = self._open(s, start)
            self.value[i] = {s: shared[s] for s in joint.storage_of[i] if s in shared}
        self.kept_before = self.value.keys() & self.kept  # by the caller, whatever is made again
        self.pinned = {life for i in self.kept_before for life in self.value[i].values()}
        for step, i in enumerate(order, start):
            self.visit(step, i)
            if overwrites(joint.nodes[i]):
                dead = self.value[joint.inputs[i][0]].values()
                self.overwritten += [(step, life) for life in dead]

    def prepare(self) -> None:
        """Find out what has to be known of all nodes before the first of them runs."""

    def visit(self, step: int, i: int) -> None:
        """Run one node: what it makes is born, what it reads is alive."""
        for u in self.joint.reads[i]:
            for life in self.value.get(u, {}).values():
                self.last[life] = step
        self.value[i] = self.made(step, i)

    def made(self, step: int, i: int) -> dict[int, int]:
        """The lives behind a node's value: opened here, or those of the value it is a view of."""
        joint = self.joint
        own, all_ = joint.allocates[i], joint.storage_of[i]
        fresh = {s: self._open(s, step) for s in own} if own else {}
        if len(own) == len(all_):
            return fresh
        for u in joint.inputs[i]:
            known = self.value.get(u, {})
            if not own and joint.storage_of[u] == all_:
                return known  # shared, as it never changes
            fresh.update((s, known[s]) for s in all_ if s in known and s not in fresh)
        return fresh

    def lives(self) -> list[Life]:
        """Every life, with what is kept alive to the end of the half."""
        for step, life in self.overwritten:
            self.last[life] = step - 1
        made = (self.value.get(i, {}).values() for i in self.kept if i not in self.kept_before)
        for life in self.pinned.union(*made):
            self.last[life] = self.end - 1
        rows = zip(self.storage, self.first, self.last, strict=True)
        return [(s, first, last) for s, first, last in rows if first < self.end]

    def _open(self, storage: int, step: int) -> int:
        self.storage.append(storage)
        self.first.append(step)
        self.last.append(step)
        return len(self.storage) - 1


class FusedHalf(Half):
    """The same, where pointwise values that only loops read are never written to memory."""

    def prepare(self) -> None:
        joint, order = self.joint, self.order
        self.written = read_by_library_calls(joint, order) | storages_of(joint, self.kept)
        self.written |= draws_read_by_reductions(joint, order)
        self.readers = Counter(chain.from_iterable(joint.inputs[i] for i in order))
        self.loops: list[tuple[int, int, set[int]]] = []  # step, result, what it may replace

    def visit(self, step: int, i: int) -> None:
        joint, kind = self.joint, self.joint.kind[i]
        if kind is OpKind.VIEW:
            base = joint.inputs[i][0]
            if base in self.reads:
                self.reads[i] = self.reads[base]
            else:
                self.value[i] = self.made(step, i)
            return
        sources: set[int] = set()
        reads, value = self.reads, self.value
        for u in joint.reads[i]:
            if u in reads:
                sources |= reads[u]
            elif u in value:
                sources.update(value[u].values())
        if kind is OpKind.POINTWISE and not self.written.intersection(joint.allocates[i]):
            limit = _MAX_READS_SHARED if self.readers[i] > 1 else _MAX_READS
            if len(sources) <= limit:
                self.reads[i] = sources
                return
        for life in sources:
            self.last[life] = step
        self.value[i] = self.made(step, i)
        if is_scatter(joint.nodes[i]):  # it starts as a copy of its first input
            base = joint.inputs[i][0]
            sources = self.reads.get(base) or set(self.value.get(base, {}).values())
        elif kind is not OpKind.POINTWISE:
            return
        self.loops += [(step, self.value[i][s], sources) for s in joint.allocates[i]]

    def lives(self) -> list[Life]:
        self._reuse_in_place()
        return super().lives()

    def _reuse_in_place(self) -> None:
        """A loop writes its result over a value of its own, of the same size, that dies there."""
        storages = self.joint.storages
        callers = (*self.kept, *self.joint.tangents)
        spared = {life for i in callers for life in self.value.get(i, {}).values()}
        dying: dict[tuple[int, int], list[int]] = {}
        for life, step in enumerate(self.last):
            if life not in spared and self.first[life] < step:
                nbytes = storages[self.storage[life]].nbytes
                dying.setdefault((step, nbytes), []).append(life)
        for step, made, sources in self.loops:
            lives = dying.get((step, storages[self.storage[made]].nbytes), [])
            if reusable := sources.intersection(lives):
                lives.remove(life := max(reusable))
                self.last[life] = step - 1


def draws_read_by_reductions(joint: JointGraph, order: Iterable[int]) -> set[int]:
    """Storages of random numbers that a reduction reads, if only through loops.

    Numbers are drawn in one long loop, which does not become one with a reduction's rows.
    """
    ran = set(order)
    stack = [i for i in ran if joint.kind[i] is OpKind.REDUCTION]
    seen, draws = set(stack), set[int]()
    while stack:
        for u in joint.inputs[stack.pop()]:
            if u in ran and u not in seen and joint.kind[u] in (OpKind.POINTWISE, OpKind.VIEW):
                seen.add(u)
                stack.append(u)
                if packet_name(joint.nodes[u].target) == "prims.inductor_random":
                    draws.update(joint.allocates[u])
    return draws


def read_by_library_calls(joint: JointGraph, order: Iterable[int]) -> set[int]:
    """Storages that something other than a loop reads."""
    return {
        s
        for i in order
        if joint.kind[i] is OpKind.EXTERN
        for u in joint.inputs[i]
        for s in joint.storage_of[u]
    }
