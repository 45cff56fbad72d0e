"""Which storages are alive at every step of a schedule.

Two models of the same schedule. *Unfused*: every node allocates its result, as the graph does
when it is interpreted. *Fused*: a pointwise value that only loops read is never written to
memory; its readers compute it from what it reads, as Inductor does. The fused model is for
planning; what is certified is the code that Inductor emits.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from memopt.graph import OpKind, source_line
from memopt.joint import JointGraph
from memopt.schedule import Schedule
from memopt.timeline import LiveRange, Step, Timeline

# Inductor writes a value with several readers to memory once it reads more buffers than
# ``realize_reads_threshold``, and any value that reads more than ``realize_acc_reads_threshold``.
_MAX_READS_SHARED = 4
_MAX_READS = 8

Life = tuple[int, int, int]
"""A storage with the first and the last step at which it is alive."""


@dataclass(frozen=True)
class Liveness:
    """Live ranges over a schedule: forward steps first, then backward steps.

    Attributes:
        schedule: what runs.
        lives: every life of every storage. A saved storage has one life in each half, which
            meet at the boundary; a recomputed one dies in the forward and is born again.
        workspace: scratch bytes by step.
    """

    schedule: Schedule
    lives: tuple[Life, ...]
    workspace: tuple[int, ...]

    @cached_property
    def live_bytes(self) -> list[int]:
        """Bytes alive at each step above what was resident before the first."""
        storages = self.schedule.joint.storages
        delta = [0] * (len(self.workspace) + 1)
        for s, first, last in self.lives:
            nbytes = storages[s].nbytes
            delta[first] += nbytes
            delta[last + 1] -= nbytes
        live = itertools.accumulate(delta[:-1])
        return [a + b for a, b in zip(live, self.workspace, strict=True)]

    @property
    def peak_bytes(self) -> int:
        """The highest of ``live_bytes``."""
        return max(self.live_bytes, default=0)

    @property
    def saved_bytes(self) -> int:
        """Bytes that the backward alone keeps alive across the boundary."""
        joint = self.schedule.joint
        crossing = storages_of(joint, self.schedule.saved) - storages_of(
            joint, joint.forward_outputs
        )
        return sum(joint.storages[s].nbytes for s in crossing)

    @property
    def output_bytes(self) -> int:
        """Bytes of the forward's outputs, which the caller may hold."""
        joint = self.schedule.joint
        outputs = storages_of(joint, joint.forward_outputs)
        return sum(joint.storages[s].nbytes for s in outputs)

    @property
    def backward_peak_bytes(self) -> int:
        """The highest of ``live_bytes`` in the backward."""
        return max(self.live_bytes[len(self.schedule.forward) :], default=0)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of what the backward returns."""
        joint = self.schedule.joint
        return sum(joint.storages[s].nbytes for s in storages_of(joint, joint.backward_outputs))

    def timeline(self, label: str) -> Timeline:
        """The same, for people: named steps and ranges with the user's source lines."""
        return _timeline(self, label)


def analyse(schedule: Schedule, workspace: Sequence[int], *, fused: bool) -> Liveness:
    """Compute every life of every storage.

    Forward outputs are taken to stay alive to the end of the step, as the caller may hold them.

    Args:
        schedule: both halves of the step.
        workspace: scratch bytes of each joint-graph node.
        fused: whether pointwise values that only loops read stay out of memory.
    """
    joint = schedule.joint
    boundary = len(schedule.forward)
    outputs = joint.forward_outputs
    half = _FusedHalf if fused else _Half
    forward = half(joint, schedule.forward, start=0, held=(), kept=(*schedule.saved, *outputs))
    backward = half(
        joint,
        schedule.backward,
        start=boundary,
        held=(*schedule.saved, *outputs, *joint.tangents),
        kept=(*joint.backward_outputs, *outputs),
    )
    steps = (*schedule.forward, *schedule.backward)
    return Liveness(
        schedule, (*forward.lives(), *backward.lives()), tuple(workspace[i] for i in steps)
    )


def storages_of(joint: JointGraph, nodes: Iterable[int]) -> set[int]:
    """The storages behind some nodes' values that the step itself allocates."""
    return {s for i in nodes for s in joint.storage_of[i] if not joint.storages[s].resident}


class _Half:
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
        shared: dict[int, int] = {}
        for i in held:
            for s in storages_of(joint, (i,)):
                if s not in shared:
                    shared[s] = self._open(s, start)
            self.value[i] = {s: shared[s] for s in joint.storage_of[i] if s in shared}
        for step, i in enumerate(order, start):
            self.visit(step, i)

    def visit(self, step: int, i: int) -> None:
        """Run one node: what it makes is born, what it reads is alive."""
        for u in self.joint.inputs[i]:
            for life in self.value.get(u, {}).values():
                self.last[life] = step
        self.value[i] = self.made(step, i)

    def made(self, step: int, i: int) -> dict[int, int]:
        """The lives behind a node's value: opened here, or those of the value it is a view of."""
        fresh = {s: self._open(s, step) for s in self.joint.allocates[i]}
        if len(fresh) < len(self.joint.storage_of[i]):
            for u in self.joint.inputs[i]:
                known = self.value.get(u, {})
                fresh.update(
                    (s, known[s])
                    for s in self.joint.storage_of[i]
                    if s in known and s not in fresh
                )
        return fresh

    def lives(self) -> list[Life]:
        """Every life, with what is kept alive to the end of the half."""
        for i in self.kept:
            for life in self.value.get(i, {}).values():
                self.last[life] = self.end - 1
        rows = zip(self.storage, self.first, self.last, strict=True)
        return [(s, first, last) for s, first, last in rows if first < self.end]

    def _open(self, storage: int, step: int) -> int:
        self.storage.append(storage)
        self.first.append(step)
        self.last.append(step)
        return len(self.storage) - 1


class _FusedHalf(_Half):
    """The same, where pointwise values that only loops read are never written to memory."""

    def __init__(
        self,
        joint: JointGraph,
        order: Sequence[int],
        *,
        start: int,
        held: Iterable[int],
        kept: Iterable[int],
    ) -> None:
        kept = tuple(kept)
        self.written = read_by_library_calls(joint, order) | storages_of(joint, kept)
        self.readers = _count_readers(joint, order)
        self.reads: dict[int, set[int]] = {}
        self.loops: list[tuple[int, int]] = []
        super().__init__(joint, order, start=start, held=held, kept=kept)

    def visit(self, step: int, i: int) -> None:
        joint, kind = self.joint, self.joint.kind[i]
        sources: set[int] = set()
        for u in joint.inputs[i]:
            sources |= self.reads.get(u) or set(self.value.get(u, {}).values())
        if kind is OpKind.VIEW and joint.inputs[i][0] in self.reads:
            self.reads[i] = self.reads[joint.inputs[i][0]]
            return
        if kind is OpKind.POINTWISE and not self.written.intersection(joint.allocates[i]):
            limit = _MAX_READS_SHARED if self.readers.get(i, 0) > 1 else _MAX_READS
            if len(sources) <= limit:
                self.reads[i] = sources
                return
        if kind is not OpKind.VIEW:
            for life in sources:
                self.last[life] = step
        self.value[i] = self.made(step, i)
        if kind is OpKind.POINTWISE:
            self.loops += [(step, self.value[i][s]) for s in joint.allocates[i]]

    def lives(self) -> list[Life]:
        self._reuse_in_place()
        return super().lives()

    def _reuse_in_place(self) -> None:
        """A loop writes its result over an input of the same size that dies there."""
        storages = self.joint.storages
        spared = {life for i in self.kept for life in self.value.get(i, {}).values()}
        dying: dict[tuple[int, int], list[int]] = {}
        for life, step in enumerate(self.last):
            if life not in spared and self.first[life] < step:
                nbytes = storages[self.storage[life]].nbytes
                dying.setdefault((step, nbytes), []).append(life)
        for step, made in self.loops:
            if reusable := dying.get((step, storages[self.storage[made]].nbytes)):
                self.last[reusable.pop()] = step - 1


def read_by_library_calls(joint: JointGraph, order: Iterable[int]) -> set[int]:
    """Storages that something other than a loop reads."""
    return {
        s
        for i in order
        if joint.kind[i] is OpKind.EXTERN
        for u in joint.inputs[i]
        for s in joint.storage_of[u]
    }


def _count_readers(joint: JointGraph, order: Sequence[int]) -> dict[int, int]:
    readers: dict[int, int] = {}
    for i in order:
        for u in joint.inputs[i]:
            readers[u] = readers.get(u, 0) + 1
    return readers


def _timeline(liveness: Liveness, label: str) -> Timeline:
    schedule = liveness.schedule
    joint, boundary = schedule.joint, len(schedule.forward)
    sources = [source_line(node) for node in joint.nodes]
    outputs = storages_of(joint, joint.forward_outputs)
    gradients = storages_of(joint, joint.backward_outputs)
    saved = storages_of(joint, schedule.saved)
    tangents = storages_of(joint, joint.tangents)
    born: dict[int, Life] = {}
    ranges: list[LiveRange] = []
    for s, first, last in sorted(liveness.lives, key=lambda life: life[1]):
        before = born.get(s)
        if before is not None and before[2] + 1 >= first:
            first = before[1]
        elif before is not None:
            ranges.append(_range(joint, sources, before, "temporary"))
        born[s] = (s, first, last)
    for s, life in born.items():
        role = (
            "output"
            if s in outputs
            else "tangent"
            if s in tangents
            else "gradient"
            if s in gradients
            else "saved"
            if s in saved
            else "recomputed"
            if life[1] >= boundary and joint.forwardable[joint.storages[s].owner]
            else "temporary"
        )
        ranges.append(_range(joint, sources, life, role))
    steps = [
        Step(joint.nodes[i].name, sources[i], backward=step >= boundary)
        for step, i in enumerate((*schedule.forward, *schedule.backward))
    ]
    for step, nbytes in enumerate(liveness.workspace):
        if nbytes:
            ranges.append(
                LiveRange(
                    name=f"workspace of {steps[step].name}",
                    nbytes=nbytes,
                    first=step,
                    last=step,
                    source=steps[step].source,
                    role="workspace",
                )
            )
    return Timeline(label, tuple(steps), tuple(ranges))


def _range(joint: JointGraph, sources: Sequence[str], life: Life, role: str) -> LiveRange:
    s, first, last = life
    storage = joint.storages[s]
    node = storage.base if storage.base >= 0 else storage.owner
    return LiveRange(
        name=joint.nodes[node].name,
        nbytes=storage.nbytes,
        first=first,
        last=last,
        source=sources[storage.owner],
        role=role,
    )
