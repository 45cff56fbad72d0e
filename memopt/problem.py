"""The planning problem: prices of saving and recomputing each node, and exact evaluation."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from memopt._torch import is_sym_node
from memopt.cost import CostModel
from memopt.graph import OpKind, tensors
from memopt.joint import JointGraph
from memopt.liveness import Liveness, analyse
from memopt.lives import read_by_library_calls, storages_of
from memopt.mincut import SavedSetNetwork
from memopt.schedule import make_schedule

INFINITE = float("inf")


@dataclass(frozen=True)
class Candidate:
    """A saved set, evaluated.

    Attributes:
        saved: joint-graph indices of the saved nodes.
        liveness: who is alive when.
        peak_bytes: the highest live bytes of the step.
        seconds: time spent on recomputation and on writing and reading what is saved.
        recompute_seconds: the part of it that is recomputation.
        origin: which search found it.
    """

    saved: frozenset[int]
    liveness: Liveness
    peak_bytes: int
    seconds: float
    recompute_seconds: float
    origin: str


@dataclass(frozen=True)
class Problem:
    """One joint graph, priced.

    Attributes:
        joint: the graph.
        cost: seconds and scratch bytes of each node.
    """

    joint: JointGraph
    cost: CostModel

    @cached_property
    def seconds(self) -> list[float]:
        """Time to run each node once.

        Where loops fuse, only a loop whose result a library call reads touches memory for it.
        """
        seconds = [self.cost.seconds(node) for node in self.joint.nodes]
        if self.cost.fused:
            joint = self.joint
            for s in read_by_library_calls(joint, range(len(joint))):
                owner = joint.storages[s].owner
                if joint.kind[owner] is OpKind.POINTWISE:
                    seconds[owner] += self.cost.traffic_seconds(joint.storages[s].nbytes)
        return seconds

    @cached_property
    def workspace(self) -> list[int]:
        """Scratch bytes of each node."""
        return [self.cost.workspace_bytes(node) for node in self.joint.nodes]

    @cached_property
    def recompute_price(self) -> list[float]:
        """Seconds that running each node in the backward adds.

        Infinite where a second run could give another value; nothing for what only the backward
        needs, since that runs once wherever it runs.
        """
        joint = self.joint
        return [
            INFINITE
            if self._pinned(i) or not joint.recomputable[i]
            else self.seconds[i]
            if joint.required_forward[i]
            else 0.0
            for i in range(len(joint))
        ]

    @cached_property
    def save_bytes(self) -> list[float]:
        """Bytes that saving each node costs: 0 for what is resident, infinite for what cannot.

        Views are never saved themselves: they are made again from their base at no cost.
        """
        joint = self.joint
        price = [INFINITE] * len(joint)
        for i, node in enumerate(joint.nodes):
            if joint.kind[i] is OpKind.INPUT:
                price[i] = 0.0
            elif joint.forwardable[i] and (is_sym_node(node) or not tensors(node.meta.get("val"))):
                price[i] = 0.0 if is_sym_node(node) else INFINITE
        for s in joint.storages:
            if s.base >= 0 and not s.resident and joint.forwardable[s.base]:
                price[s.base] = float(s.nbytes)
        return price

    @cached_property
    def needed(self) -> list[int]:
        """Values of the forward that the true backward reads."""
        joint = self.joint
        read = {
            u
            for i in range(len(joint))
            if not joint.forwardable[i]
            for u in joint.inputs[i]
            if joint.forwardable[u]
        }
        read.update(i for i in joint.backward_outputs if joint.forwardable[i])
        return sorted(read)

    @cached_property
    def forward_seconds(self) -> float:
        """Time of the forward half."""
        return sum(
            s for s, on in zip(self.seconds, self.joint.required_forward, strict=True) if on
        )

    def evaluate(self, saved: Iterable[int], origin: str) -> Candidate:
        """Schedule the two halves for a saved set, and measure it exactly under the model.

        What may not run twice, such as a random draw, is added to the set where it is missing.
        """
        schedule = make_schedule(self.joint, saved)
        if any(self.recompute_price[i] == INFINITE for i in schedule.recomputed):
            schedule = make_schedule(self.joint, self._repaired(schedule.saved))
        liveness = analyse(schedule, self.workspace, fused=self.cost.fused)
        recompute = sum(self.seconds[i] for i in schedule.recomputed)
        traffic = self.cost.traffic_seconds(liveness.saved_bytes)
        return Candidate(
            schedule.saved,
            liveness,
            liveness.peak_bytes,
            recompute + traffic,
            recompute,
            origin,
        )

    def cut(self, price: Callable[[int], float]) -> frozenset[int]:
        """The cheapest saved set when saving node ``i`` costs ``price(i)`` seconds per byte."""
        traffic = self.cost.traffic_seconds(1)
        save = [
            b if b in (0.0, INFINITE) else b * (price(i) + traffic)
            for i, b in enumerate(self.save_bytes)
        ]
        return self._cheapest(save, self.recompute_price)

    def keep_everything(self) -> Candidate:
        """Save every value that the backward reads: nothing but views runs twice."""
        always = [INFINITE if price > 0 else 0.0 for price in self.recompute_price]
        return self.evaluate(self._cheapest(self.save_bytes, always), "everything kept")

    def _repaired(self, saved: Iterable[int]) -> frozenset[int]:
        """The set with the fewest bytes added that leaves nothing forbidden to recompute."""
        chosen = frozenset(i for i in saved if self.joint.kind[i] is not OpKind.INPUT)
        save = [0.0 if i in chosen else b for i, b in enumerate(self.save_bytes)]
        free = [p if p == INFINITE else 0.0 for p in self.recompute_price]
        return chosen | self._cheapest(save, free)

    def _cheapest(self, save: Sequence[float], recompute: Sequence[float]) -> frozenset[int]:
        """The saved set of least cost; what is resident anyway is left out."""
        chosen = self._network.cheapest(save, recompute)
        return frozenset(i for i in chosen if self.joint.kind[i] is not OpKind.INPUT)

    @cached_property
    def _network(self) -> SavedSetNetwork:
        return SavedSetNetwork(self.joint.inputs, self.needed)

    def saved_storages(self, saved: Iterable[int]) -> set[int]:
        """The storages that a saved set holds across the boundary."""
        outputs = storages_of(self.joint, self.joint.forward_outputs)
        return storages_of(self.joint, saved) - outputs

    def _pinned(self, i: int) -> bool:
        return not self.joint.recomputable[i] and self.joint.kind[i] is not OpKind.VIEW
