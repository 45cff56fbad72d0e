"""Which storages are alive at every step of a schedule.

Two models of the same schedule. *Unfused*: every node allocates its result, as the graph does
when it is interpreted. *Fused*: a pointwise value that only loops read is never written to
memory; its readers compute it from what it reads, as Inductor does. The fused model is for
planning; what is certified is the code that Inductor emits.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
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

    def timeline(self, label: str) -> Timeline:
        """The same, for people: named steps and ranges with the user's source lines."""
        return _timeline(self, label)


def analyse(schedule: Schedule, workspace: Sequence[int], *, fused: bool) -> Liveness:
    """Compute the life of every storage.

    Forward outputs are taken to stay alive to the end of the step, as the caller may hold them.

    Args:
        schedule: both halves of the step.
        workspace: scratch bytes of each joint-graph node.
        fused: whether pointwise values that only loops read stay out of memory.
    """
    joint = schedule.joint
    saved = storages_of(joint, schedule.saved)
    outputs = storages_of(joint, joint.forward_outputs)
    gradients = storages_of(joint, joint.backward_outputs)
    tangents = storages_of(joint, joint.tangents)
    half = _fused_half if fused else _unfused_half
    boundary = len(schedule.forward)
    lives = half(joint, schedule.forward, 0, set(), saved | outputs)
    lives += half(
        joint, schedule.backward, boundary, saved | outputs | tangents, gradients | outputs
    )
    steps = (*schedule.forward, *schedule.backward)
    return Liveness(schedule, tuple(lives), tuple(workspace[i] for i in steps))


def storages_of(joint: JointGraph, nodes: Iterable[int]) -> set[int]:
    """The storages behind some nodes' values that the step itself allocates."""
    return {s for i in nodes for s in joint.storage_of[i] if not joint.storages[s].resident}


def _unfused_half(
    joint: JointGraph, order: Sequence[int], start: int, held: set[int], kept: set[int]
) -> list[Life]:
    first = dict.fromkeys(held, start)
    last = dict.fromkeys(held, start)
    for step, i in enumerate(order, start):
        for s in joint.allocates[i]:
            first[s] = last[s] = step
        for u in joint.inputs[i]:
            for s in joint.storage_of[u]:
                last[s] = step
    return _close(first, last, kept, start + len(order))


def _fused_half(
    joint: JointGraph, order: Sequence[int], start: int, held: set[int], kept: set[int]
) -> list[Life]:
    """(1) Find what must be in memory; (2) let every other pointwise value read through."""
    written = _read_by_library_calls(joint, order) | kept  # (1)
    readers = _count_readers(joint, order)
    first = dict.fromkeys(held, start)
    last = dict.fromkeys(held, start)
    reads: dict[int, Collection[int]] = {}
    loops: list[tuple[int, int]] = []
    for step, i in enumerate(order, start):
        sources: set[int] = set()
        for u in joint.inputs[i]:
            sources.update(reads.get(u, joint.storage_of[u]))
        kind = joint.kind[i]
        if kind is OpKind.VIEW:
            reads[i] = reads.get(joint.inputs[i][0], joint.storage_of[i])
            continue
        made = joint.allocates[i]
        if kind is OpKind.POINTWISE and not written.intersection(made):
            limit = _MAX_READS_SHARED if readers.get(i, 0) > 1 else _MAX_READS
            if len(sources) <= limit:  # (2)
                reads[i] = sources
                continue
        for s in made:
            first[s] = last[s] = step
        for s in sources:
            last[s] = step
        if kind is OpKind.POINTWISE:
            loops.append((step, i))
    _reuse_in_place(joint, loops, first, last, kept)
    return _close(first, last, kept, start + len(order))


def _reuse_in_place(
    joint: JointGraph,
    loops: list[tuple[int, int]],
    first: dict[int, int],
    last: dict[int, int],
    kept: set[int],
) -> None:
    """A loop writes its result over an input of the same size that dies there."""
    dying: dict[tuple[int, int], list[int]] = {}
    for s, step in last.items():
        if s not in kept and first.get(s, step) < step:
            dying.setdefault((step, joint.storages[s].nbytes), []).append(s)
    for step, i in loops:
        for made in joint.allocates[i]:
            if reusable := dying.get((step, joint.storages[made].nbytes)):
                last[reusable.pop()] = step - 1


def _read_by_library_calls(joint: JointGraph, order: Sequence[int]) -> set[int]:
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


def _close(first: dict[int, int], last: dict[int, int], kept: set[int], end: int) -> list[Life]:
    """Extend what is kept to the end of the half, and list the lives."""
    return [(s, f, end - 1 if s in kept else last[s]) for s, f in first.items() if f < end]


def _timeline(liveness: Liveness, label: str) -> Timeline:
    schedule = liveness.schedule
    joint, boundary = schedule.joint, len(schedule.forward)
    sources = [source_line(node) for node in joint.nodes]
    outputs = storages_of(joint, joint.forward_outputs)
    gradients = storages_of(joint, joint.backward_outputs)
    saved = storages_of(joint, schedule.saved)
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
