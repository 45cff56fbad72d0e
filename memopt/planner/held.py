"""Which values may be held in another form at once: as hosts have room, and errors allow."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from memopt.graph import OpKind
from memopt.joint import Encoding, JointGraph
from memopt.memory.schedule import Schedule
from memopt.memory.transfers import Link


@dataclass(frozen=True)
class FormLimits:
    """The bounds on all forms of a saved set together.

    Attributes:
        joint: the graph, with the forms that its values are offered.
        links: to where values may be held off the device, by the kind of form; the nearest first.
        error: bound on the gradient's error, over its norm, by values that come back rounded.
        save_bytes: bytes that saving each node costs.
        graphs: how many of the same plan share what the links' ends may hold.
    """

    joint: JointGraph
    links: Mapping[str, Link]
    error: float
    save_bytes: Sequence[float]
    graphs: int = 1

    def admit(self, saved: frozenset[int]) -> frozenset[int]:
        """The same saved set, with values in other forms as far as all bounds allow."""
        return self._within_error(self._within_host(saved))

    def _within_host(self, saved: frozenset[int]) -> frozenset[int]:
        """The same set, with no more at the end of each link than it may hold.

        What has no room goes to the next link's end, the first values of the step before others,
        since they are away for the longest; without another link, the last ones stay.
        """
        kinds = [*self.links]
        for at, kind in enumerate(kinds):
            limit = self.links[kind].host_bytes
            if limit is None:
                continue
            further = {e.source: e for e in self._offered(kinds[at + 1 :])}
            here = [e for e in self._offered([kind]) if e.encoded in saved]
            left = limit / self.graphs
            for encoding in reversed(here) if further else here:
                if encoding.host_nbytes <= left:
                    left -= encoding.host_nbytes
                    continue
                next_ = further.get(encoding.source)
                elsewhere = next_.encoded if next_ else encoding.source
                saved = saved - {encoding.encoded} | {elsewhere}
        return saved

    def _offered(self, kinds: Collection[str]) -> list[Encoding]:
        return [e for e in self.joint.encodings if e.kind in kinds]

    def _within_error(self, saved: frozenset[int]) -> frozenset[int]:
        """The same set, with no more values rounded than the gradient's error allows.

        A factor of a weight's gradient is in no other gradient: each of those is off by its own
        rounding. What loops of the backward read is in all gradients of earlier layers: there
        the squares of independent roundings add up. The largest values are first.
        """
        rounded = [e for e in self.joint.encodings if e.loss and e.encoded in saved]
        rounded.sort(key=lambda e: (-self.save_bytes[e.source], e.source))
        spent, over = max((e.loss**2 for e in rounded), default=0.0), []
        for encoding in rounded:
            more = encoding.loss**2 if self._is_read_by_loops(encoding) else 0.0
            if spent + more > self.error**2:
                over.append(encoding)
            else:
                spent += more
        return as_they_are(saved, over)

    def _is_read_by_loops(self, encoding: Encoding) -> bool:
        """Whether loops of the true backward read the value."""
        return not self._loop_reads.isdisjoint(self.joint.storage_of[encoding.source])

    @cached_property
    def _loop_reads(self) -> set[int]:
        joint = self.joint
        loops = (OpKind.POINTWISE, OpKind.REDUCTION)
        return {
            s
            for i in range(len(joint))
            if not joint.forwardable[i] and joint.kind[i] in loops
            for u in joint.inputs[i]
            for s in joint.storage_of[u]
        }


def misused_forms(schedule: Schedule) -> set[Encoding]:
    """Rounded values from which more is run again than loops: a sum must be the forward's."""
    joint, again = schedule.behind, {*schedule.recomputed}
    encodings = schedule.joint.encodings
    rounded = {e.decoded: {e} for e in encodings if e.loss and e.encoded in schedule.saved}
    misused: set[Encoding] = set()
    if not rounded:
        return misused
    for i in schedule.backward:
        read = set().union(*(rounded.get(u, ()) for u in joint.inputs[i]))
        if not read or i not in again:
            continue
        if joint.kind[i] in (OpKind.POINTWISE, OpKind.VIEW):
            rounded[i] = read
        else:
            misused |= read
    return misused


def as_they_are(saved: frozenset[int], encodings: Iterable[Encoding]) -> frozenset[int]:
    """The same set, with some values not in another form."""
    chosen = tuple(encodings)
    return saved - {e.encoded for e in chosen} | {e.source for e in chosen}
