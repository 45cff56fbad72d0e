"""The order in which the two halves of a step run, given what is saved between them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from memopt.graph import OpKind
from memopt.joint import JointGraph


@dataclass(frozen=True)
class Schedule:
    """What runs, when: indices of joint-graph nodes.

    Attributes:
        joint: the graph.
        behind: the same as the backward runs it: see ``JointGraph.holding``.
        saved: nodes whose values cross from the forward to the backward.
        forward: the forward half, in order.
        backward: the backward half, in order, recomputation included.
        leaves: for each value that is copied to the host the step, in the forward, by which it
            has left the device.
    """

    joint: JointGraph
    behind: JointGraph
    saved: frozenset[int]
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    leaves: Mapping[int, int] = field(default_factory=dict)

    @cached_property
    def recomputed(self) -> tuple[int, ...]:
        """Forward nodes that the backward runs again, in the order it runs them."""
        ran = set(self.forward)
        return tuple(i for i in self.backward if i in ran)


def make_schedule(joint: JointGraph, saved: Iterable[int]) -> Schedule:
    """Order both halves; each recomputation runs just before its first use.

    Of what is to be saved, what the backward does not read is left out; results that the caller
    holds anyway are not recomputed.

    Running recomputation early would hold its results for longer than needed: the peak of a
    checkpointed step depends on this order as much as on what is saved.
    """
    saved = joint.settled(saved).union(joint.returned)
    behind = joint.holding(saved)
    backward = _backward(behind, saved)
    saved &= {u for i in backward for u in behind.inputs[i]}.union(joint.backward_outputs)
    forward = _forward(joint, _ancestors(joint, [*joint.forward_outputs, *saved]))
    return Schedule(
        joint,
        behind,
        saved,
        forward=tuple(_take_apart_at_once(joint, forward)),
        backward=tuple(_take_apart_at_once(behind, backward)),
    )


def _forward(joint: JointGraph, needed: set[int]) -> list[int]:
    return [i for i in range(len(joint)) if i in needed and joint.kind[i] is not OpKind.INPUT]


def _backward(joint: JointGraph, saved: frozenset[int]) -> list[int]:
    """(1) Walk the true backward nodes in joint order; (2) bring in what each lacks, in order."""
    inputs, kind = joint.inputs, joint.kind
    needed = _ancestors(joint, joint.backward_outputs, stop=saved)
    done = [k is OpKind.INPUT for k in kind]
    for i in saved:
        done[i] = True
    order: list[int] = []
    roots = [i for i in sorted(needed) if not joint.forwardable[i]]  # (1)
    for root in [*roots, *joint.backward_outputs]:
        if done[root]:
            continue
        missing, stack = [], [root]  # (2)
        while stack:
            i = stack.pop()
            if done[i]:
                continue
            done[i] = True
            missing.append(i)
            stack.extend(inputs[i])
        order.extend(sorted(missing))
    return order


def _take_apart_at_once(joint: JointGraph, order: list[int]) -> list[int]:
    """Move every ``getitem`` behind the tuple it takes apart, so that the rest can die."""
    ran, parts = set(order), joint.parts
    moved = {i for whole in ran.intersection(parts) for i in parts[whole]}
    result: list[int] = []
    for i in order:
        stack = [] if i in moved else [i]
        while stack:
            node = stack.pop()
            result.append(node)
            if node in parts:
                stack.extend(part for part in reversed(parts[node]) if part in ran)
    return result


def _ancestors(
    joint: JointGraph, roots: Iterable[int], stop: frozenset[int] = frozenset()
) -> set[int]:
    """Everything the roots depend on, themselves included, not looking past ``stop``."""
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        i = stack.pop()
        if i in seen:
            continue
        seen.add(i)
        if i not in stop:
            stack.extend(joint.inputs[i])
    return seen
