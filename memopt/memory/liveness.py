"""Which storages are alive at every step of a schedule, and how many bytes that makes.

The unfused model is exact for graphs that are interpreted. The fused model is for planning; what
is certified is the code that Inductor emits.
"""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from memopt.graph import source_line, tensors
from memopt.joint import JointGraph
from memopt.memory.lives import FusedHalf, Half, Life, storages_of
from memopt.memory.schedule import Schedule
from memopt.memory.timeline import LiveRange, Step, Timeline


@dataclass(frozen=True)
class Liveness:
    """Live ranges over a schedule: forward steps first, then backward steps.

    Attributes:
        schedule: what runs.
        lives: every life of every storage. A saved storage has one life in each half, which
            meet at the boundary; a recomputed one dies in the forward and is born again.
        workspace: scratch bytes by step.
        inlined: by half, nodes whose values are computed inside their readers, never written.
    """

    schedule: Schedule
    lives: tuple[Life, ...]
    workspace: tuple[int, ...]
    inlined: tuple[frozenset[int], frozenset[int]]

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

    def alive_at_peak(self) -> list[str]:
        """Names of the values that the peak is made of, the largest first."""
        joint, live = self.schedule.joint, self.live_bytes
        if not live:
            return []
        peak = live.index(max(live))
        alive = {s for s, first, last in self.lives if first <= peak <= last}
        storages = sorted((joint.storages[s] for s in alive), key=lambda s: (-s.nbytes, s.owner))
        return [joint.nodes[s.base if s.base >= 0 else s.owner].name for s in storages]

    def peak_among(self, names: Collection[str]) -> int:
        """The highest of ``live_bytes`` while some nodes run."""
        nodes = self.schedule.joint.nodes
        steps = (*self.schedule.forward, *self.schedule.backward)
        live = zip(steps, self.live_bytes, strict=True)
        return max((nbytes for i, nbytes in live if nodes[i].name in names), default=0)

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

    Forward outputs are taken to stay alive to the end of the step, as the caller may hold them; so
    are gradients of scalars, as ``Tensor.backward`` holds that of the loss.

    Args:
        schedule: both halves of the step.
        workspace: scratch bytes of each joint-graph node.
        fused: whether pointwise values that only loops read stay out of memory.
    """
    joint = schedule.joint
    boundary = len(schedule.forward)
    outputs = joint.forward_outputs
    roots = [
        i for i in joint.tangents if any(t.dim() == 0 for t in tensors(joint.nodes[i].meta["val"]))
    ]
    half = FusedHalf if fused else Half
    forward = half(joint, schedule.forward, start=0, held=(), kept=(*schedule.saved, *outputs))
    backward = half(
        schedule.behind,
        schedule.backward,
        start=boundary,
        held=(*schedule.saved, *outputs, *joint.tangents),
        kept=(*joint.backward_outputs, *outputs, *roots),
    )
    steps = (*schedule.forward, *schedule.backward)
    leaves = {s: last for i, last in schedule.leaves.items() for s in joint.storage_of[i]}
    ahead = [(s, first, max(last, leaves.get(s, last))) for s, first, last in forward.lives()]
    return Liveness(
        schedule,
        (*ahead, *backward.lives()),
        tuple(workspace[i] for i in steps),
        (frozenset(forward.reads), frozenset(backward.reads)),
    )


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
