"""Live bytes over the schedule of a step: how high, where, and who holds them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRange:
    """One storage's life: it is live at every step in ``[first, last]``.

    Attributes:
        name: the graph node or buffer that owns the storage.
        nbytes: its size in bytes.
        first: index of the step that allocates it.
        last: index of the last step that needs it.
        source: the user's ``file:line`` that made it, or ``""``.
        role: ``"saved"``, ``"output"``, ``"tangent"``, ``"gradient"``, ``"recomputed"``,
            ``"workspace"`` or ``"temporary"``.
    """

    name: str
    nbytes: int
    first: int
    last: int
    source: str = ""
    role: str = "temporary"


@dataclass(frozen=True, slots=True)
class Step:
    """One entry of the schedule: a node, kernel or call, with the user's ``file:line``."""

    name: str
    source: str = ""
    backward: bool = False


@dataclass(frozen=True)
class Timeline:
    """Bytes alive at every step, above what is resident when the step starts.

    Attributes:
        label: what this is the timeline of, such as ``"plan"`` or ``"everything kept"``.
        steps: the schedule, forward first.
        ranges: the live range of every storage the schedule allocates.
    """

    label: str
    steps: tuple[Step, ...]
    ranges: tuple[LiveRange, ...]

    @property
    def live_bytes(self) -> tuple[int, ...]:
        """Live bytes at each step, as a prefix sum over births and deaths."""
        delta = [0] * (len(self.steps) + 1)
        for r in self.ranges:
            delta[r.first] += r.nbytes
            delta[r.last + 1] -= r.nbytes
        return tuple(itertools.accumulate(delta[:-1]))

    @property
    def peak_bytes(self) -> int:
        """The highest live bytes of any step; 0 for an empty schedule."""
        return max(self.live_bytes, default=0)

    @property
    def peak_step(self) -> int:
        """Index of the first step that reaches the peak."""
        live = self.live_bytes
        return live.index(max(live)) if live else 0

    def holders(self, step: int) -> Sequence[LiveRange]:
        """The storages alive at ``step``, largest first."""
        alive = [r for r in self.ranges if r.first <= step <= r.last and r.nbytes]
        return sorted(alive, key=lambda r: (-r.nbytes, r.name))

    def to_dict(self) -> dict[str, object]:
        """A compact JSON form: steps as ``[name, source, backward]``, ranges as lists."""
        return {
            "label": self.label,
            "peak_bytes": self.peak_bytes,
            "peak_step": self.peak_step,
            "steps": [[s.name, s.source, int(s.backward)] for s in self.steps],
            "ranges": [[r.name, r.nbytes, r.first, r.last, r.source, r.role] for r in self.ranges],
        }

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> "Timeline":
        """The timeline that ``to_dict`` wrote."""
        steps = tuple(Step(name, source, bool(back)) for name, source, back in body["steps"])
        ranges = tuple(
            LiveRange(name=n, nbytes=b, first=f, last=e, source=s, role=r)
            for n, b, f, e, s, r in body["ranges"]
        )
        return cls(body["label"], steps, ranges)
