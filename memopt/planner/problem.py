"""The planning problem: prices of saving and recomputing each node, and exact evaluation."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from memopt._torch import is_sym_node
from memopt.cost import CostModel
from memopt.graph import OpKind, tensors
from memopt.joint import Encoding, JointGraph
from memopt.memory.liveness import Liveness, analyse
from memopt.memory.lives import read_by_library_calls, storages_of
from memopt.memory.schedule import make_schedule
from memopt.memory.transfers import Link, place_copies
from memopt.planner.held import FormLimits, as_they_are, misused_forms
from memopt.planner.mincut import SavedSetNetwork

INFINITE = float("inf")


@dataclass(frozen=True)
class Candidate:
    """A saved set, evaluated.

    Attributes:
        saved: joint-graph indices of the saved nodes.
        liveness: who is alive when.
        peak_bytes: the highest live bytes of the step, those of the graph's repeats with them.
        seconds: time spent on recomputation and on writing and reading what is saved.
        recompute_seconds: the part of it that is recomputation.
        stall_seconds: the part of it that the step waits for copies to and from the host.
        origin: which search found it.
    """

    saved: frozenset[int]
    liveness: Liveness
    peak_bytes: int
    seconds: float
    recompute_seconds: float
    stall_seconds: float
    origin: str


@dataclass(frozen=True)
class Problem:
    """One joint graph, priced.

    Attributes:
        joint: the graph.
        cost: seconds and scratch bytes of each node.
        links: to where values may be held off the device, by the kind of form; the nearest first.
        error: bound on the gradient's error, over its norm, by values that do not come back as
            they were.
        repeats: as in `Config`.
    """

    joint: JointGraph
    cost: CostModel
    links: Mapping[str, Link] = field(default_factory=dict)
    error: float = 0.0
    repeats: int = 1

    @property
    def others(self) -> int:
        """How many repeats hold what they saved while the last one runs."""
        return self.repeats - 1 if self.joint.backward_outputs else 0

    @cached_property
    def seconds(self) -> list[float]:
        """Time to run each node once.

        Where loops fuse, only a loop whose result a library call reads touches memory for it.
        """
        seconds = [self.cost.seconds(node) for node in self.joint.nodes]
        if self.cost.fused:
            joint = self.joint
            offered = {i for encoding in joint.encodings for i in encoding.inner}
            for s in read_by_library_calls(joint, set(range(len(joint))) - offered):
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
        for encoding in joint.encodings:
            for i in encoding.inner:
                if i != encoding.encoded:
                    price[i] = INFINITE
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
    def forward_share(self) -> list[float]:
        """Seconds of each node in the forward half."""
        on = self.joint.required_forward
        return [s if runs else 0.0 for s, runs in zip(self.seconds, on, strict=True)]

    @property
    def forward_seconds(self) -> float:
        """Time of the forward half."""
        return sum(self.forward_share)

    def evaluate(self, saved: Iterable[int], origin: str, *, waits: bool = True) -> Candidate:
        """Schedule the two halves for a saved set, and measure it exactly under the model.

        What may not run twice, such as a random draw, is added to the set where it is missing.

        Args:
            saved: joint-graph indices of the nodes to save.
            origin: which search found it.
            waits: whether copies to the host take time.
        """
        saved = self._limits.admit(self.joint.settled(saved))
        schedule = make_schedule(self.joint, saved)
        if any(self.recompute_price[i] == INFINITE for i in schedule.recomputed):
            schedule = make_schedule(self.joint, self._repaired(schedule.saved))
        if misused := misused_forms(schedule):
            schedule = make_schedule(self.joint, as_they_are(schedule.saved, misused))
        stall = 0.0
        if away := self._away(schedule.saved):
            copies = {e: self.link_seconds(e) if waits else 0.0 for e in away}
            schedule, stall = place_copies(schedule, copies, self.seconds)
        liveness = analyse(schedule, self.workspace, fused=self.cost.fused)
        held = self.others * (liveness.saved_bytes + liveness.output_bytes)
        recompute = sum(self.seconds[i] for i in schedule.recomputed)
        traffic = self.cost.traffic_seconds(liveness.saved_bytes)
        coding = sum(self.encoding_seconds.get(i, 0.0) for i in schedule.saved)
        return Candidate(
            schedule.saved,
            liveness,
            liveness.peak_bytes + held,
            recompute + traffic + coding + stall,
            recompute,
            stall,
            origin,
        )

    @cached_property
    def _limits(self) -> FormLimits:
        return FormLimits(self.joint, self.links, self.error, self.save_bytes, 1 + self.others)

    @cached_property
    def encoding_seconds(self) -> dict[int, float]:
        """Time to make each other form of a value, and the value of it, by the form's node.

        What is copied to the host and back is read and written on the device as well.
        """
        return {
            e.encoded: sum(self.seconds[i] for i in e.inner)
            + self.cost.traffic_seconds(e.host_nbytes)
            for e in self.joint.encodings
        }

    def step_seconds(self, candidate: Candidate) -> float:
        """Time of both halves."""
        schedule = candidate.liveness.schedule
        runs = sum(self.seconds[i] for i in (*schedule.forward, *schedule.backward))
        saved = self.cost.traffic_seconds(candidate.liveness.saved_bytes)
        return runs + saved + candidate.stall_seconds

    def _away(self, saved: Collection[int]) -> list[Encoding]:
        """What is held on the host."""
        return [e for e in self.joint.encodings if e.host_nbytes and e.encoded in saved]

    def link_seconds(self, encoding: Encoding) -> float:
        """Time of a value's way to the host; as long again for the way back."""
        away = encoding.host_nbytes
        return away / self.links[encoding.kind].bandwidth if away else 0.0

    def holding_seconds(self, encoding: Encoding) -> float:
        """What a value's other form costs at most: where its way to the host is waited for."""
        return self.encoding_seconds[encoding.encoded] + 2 * self.link_seconds(encoding)

    def away_bytes(self, saved: Collection[int]) -> dict[str, int]:
        """Bytes at the end of each link, by the kind of form."""
        held = dict.fromkeys(self.links, 0)
        for encoding in self._away(saved):
            held[encoding.kind] += encoding.host_nbytes
        return held

    def cut(self, price: Callable[[int], float], link_share: float = INFINITE) -> frozenset[int]:
        """The cheapest saved set when saving node ``i`` costs ``price(i)`` seconds per byte.

        Each value is saved in its cheapest form.

        Args:
            price: of a byte on the device.
            link_share: how much of a copy's time its value on the host costs, there and back.
        """
        traffic = self.cost.traffic_seconds(1)
        save = [
            b if b in (0.0, INFINITE) else b * (price(i) + traffic)
            for i, b in enumerate(self.save_bytes)
        ]
        form: dict[int, int] = {}
        for encoding in self.joint.encodings:
            whole = save[encoding.encoded] + self.encoding_seconds[encoding.encoded]
            if encoding.host_nbytes:
                whole += link_share * self.link_seconds(encoding)
            if whole < save[encoding.source]:
                save[encoding.source] = whole
                form[encoding.source] = encoding.encoded
        return frozenset(form.get(i, i) for i in self._cheapest(save, self.recompute_price))

    def keep_everything(self) -> Candidate:
        """Save every value that the backward reads: nothing but views runs twice."""
        always = [INFINITE if price > 0 else 0.0 for price in self.recompute_price]
        return self.evaluate(self._cheapest(self.save_bytes, always), "everything kept")

    def _repaired(self, saved: Iterable[int]) -> frozenset[int]:
        """The set with the fewest bytes added that leaves nothing forbidden to recompute."""
        chosen = frozenset(i for i in saved if self.joint.kind[i] is not OpKind.INPUT)
        held = {e.source for e in self.joint.encodings if e.encoded in chosen}
        save = [0.0 if i in chosen | held else b for i, b in enumerate(self.save_bytes)]
        free = [p if p == INFINITE else 0.0 for p in self.recompute_price]
        return chosen | (self._cheapest(save, free) - held)

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
