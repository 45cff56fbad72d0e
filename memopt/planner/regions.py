"""Cuts the forward into regions where little crosses, and tabulates what each level costs there.

A *level* is a saved set for the whole graph. A *region* is a stretch of the forward between two
narrow points. A mixed plan gives each region its own level; the tables here price any mix with
one row per phase of the step, from one exact evaluation per level.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memopt.graph import OpKind
from memopt.planner.problem import Candidate, Problem

MAX_REGIONS = 64


@dataclass(frozen=True)
class Tables:
    """Prices of a mixed plan, by region ``r`` (rows) and level ``l`` (columns).

    Attributes:
        levels: the uniform plans.
        region_of: region of each joint-graph node.
        seconds: time of recomputing and saving in region ``r`` at level ``l``.
        link_seconds: time of the way to the host of what region ``r`` holds there.
        running: time that the forward of each region runs; its backward runs twice as long.
        saved_bytes: bytes that region ``r`` holds across the boundary at level ``l``.
        forward_bytes, backward_bytes: peak while region ``r`` runs, less what earlier regions
            have saved.
        others: how many repeats of the graph hold what they saved while it runs.
        output_bytes: what each of them returned.
    """

    levels: Sequence[Candidate]
    region_of: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]
    link_seconds: npt.NDArray[np.float64]
    running: npt.NDArray[np.float64]
    saved_bytes: npt.NDArray[np.float64]
    forward_bytes: npt.NDArray[np.float64]
    backward_bytes: npt.NDArray[np.float64]
    others: int = 0
    output_bytes: int = 0

    def mix(self, choice: Sequence[int]) -> frozenset[int]:
        """The saved set that takes level ``choice[r]`` in region ``r``."""
        return frozenset(
            i
            for level in set(choice)
            for i in self.levels[level].saved
            if choice[self.region_of[i]] == level
        )

    @property
    def beside(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """How long the step runs beside copies of what regions from ``r`` on hold on the host.

        To the host it is the rest of the forward; back, the backward of the regions after ``r``.
        """
        rest = np.cumsum(self.running[::-1])[::-1]
        return rest, 2 * (rest - self.running)

    def stall(self, link_seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Seconds that the step waits for copies, of times per region in the last dimension."""
        copied = np.cumsum(link_seconds[..., ::-1], axis=-1)[..., ::-1]
        out, back = (np.max(copied - time, axis=-1, initial=0.0) for time in self.beside)
        waits: npt.NDArray[np.float64] = out + back
        return waits

    def peak(self, choice: Sequence[int]) -> float:
        """Peak bytes of a mix, as the tables see it."""
        rows = np.arange(len(choice))
        saved = self.saved_bytes[rows, choice]
        before = np.cumsum(saved) - saved
        own = np.maximum(self.forward_bytes[rows, choice], self.backward_bytes[rows, choice])
        held = self.others * (saved.sum() + self.output_bytes)
        return float(np.max(before + own) + held)


@dataclass(frozen=True)
class Regions:
    """The forward, cut.

    Attributes:
        of: region of each joint-graph node.
        crossing: for each boundary, in order, the values that later regions read, to be saved.
    """

    of: npt.NDArray[np.int64]
    crossing: tuple[frozenset[int], ...]

    def checkpoints(self) -> Iterator[frozenset[int]]:
        """What crosses every boundary, every second one, every fourth one, and so on.

        Saving that alone is per-block checkpointing: Chen et al. (2016), arXiv:1604.06174.
        """
        every = 1
        while self.crossing[every - 1 :: every]:
            yield frozenset().union(*self.crossing[every - 1 :: every])
            every *= 2


def find_regions(problem: Problem) -> Regions:
    """Assign every node to a region of the forward.

    Boundaries are taken at the narrowest points first, so long as the regions they make still
    allocate their share of the forward's bytes.
    """
    joint = problem.joint
    forward = [
        i for i in range(len(joint)) if joint.required_forward[i] and joint.kind[i] != OpKind.INPUT
    ]
    made = {s: step for step, i in enumerate(forward) for s in joint.allocates[i]}
    last = dict(made)
    for step, i in enumerate(forward):
        for u in joint.inputs[i]:
            for s in joint.storage_of[u]:
                if s in last:
                    last[s] = step
    delta = np.zeros(len(forward) + 1)
    grown = np.zeros(len(forward))
    for s, step in made.items():
        nbytes = joint.storages[s].nbytes
        grown[step] += nbytes
        delta[step] += nbytes
        delta[last[s]] -= nbytes
    crossing, grown = np.cumsum(delta[:-1]), np.cumsum(grown)
    spacing = (grown[-1] if len(grown) else 0) / MAX_REGIONS
    cuts: list[int] = []
    for step in np.lexsort((np.arange(len(forward)), crossing)):
        marks = np.array([0.0, *(grown[c] for c in cuts)])
        if grown[step] < grown[-1] and np.min(np.abs(marks - grown[step])) >= spacing:
            cuts.append(int(step))
    cuts.sort()
    edges = [forward[c] for c in cuts]
    region_of = np.searchsorted(
        np.array(edges, dtype=np.int64), np.arange(len(joint)), side="left"
    )
    for encoding in joint.encodings:
        region_of[[*encoding.inner]] = region_of[encoding.source]
    crossed = tuple(
        frozenset(joint.storages[s].base for s in made if made[s] <= cut < last[s]) - {-1}
        for cut in cuts
    )
    return Regions(region_of, crossed)


def tabulate(
    problem: Problem, region_of: npt.NDArray[np.int64], levels: Sequence[Candidate]
) -> Tables:
    """Read one column per level from its exact evaluation."""
    regions = int(region_of.max()) + 1 if len(region_of) else 1
    shape = (regions, len(levels))
    seconds, away, saved = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    forward, backward = np.zeros(shape), np.zeros(shape)
    joint = problem.joint
    running = np.bincount(region_of, problem.forward_share, regions).astype(np.float64)
    for column, level in enumerate(levels):
        for i in level.liveness.schedule.recomputed:
            seconds[region_of[i], column] += problem.seconds[i]
        for s in problem.saved_storages(level.saved):
            owner = joint.storages[s].owner
            saved[region_of[owner], column] += joint.storages[s].nbytes
        for encoding in joint.encodings:
            if encoding.encoded in level.saved:
                r = region_of[encoding.source]
                seconds[r, column] += problem.encoding_seconds[encoding.encoded]
                away[r, column] += problem.link_seconds(encoding)
        seconds[:, column] += saved[:, column] * problem.cost.traffic_seconds(1)
        before = np.cumsum(saved[:, column]) - saved[:, column]
        ahead, behind = _phase_peaks(level, region_of, regions)
        forward[:, column] = ahead - before
        backward[:, column] = behind - before
    outputs = levels[0].liveness.output_bytes if levels else 0
    return Tables(
        levels,
        region_of,
        seconds,
        away,
        running,
        saved,
        forward,
        backward,
        problem.others,
        outputs,
    )


def _phase_peaks(
    level: Candidate, region_of: npt.NDArray[np.int64], regions: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Peak live bytes while each region runs forward, and while its backward runs.

    The backward belongs to the last region whose values it still reads.
    """
    schedule, live = level.liveness.schedule, level.liveness.live_bytes
    joint = schedule.joint
    ahead, behind = np.zeros(regions), np.zeros(regions)
    for step, i in enumerate(schedule.forward):
        r = region_of[i]
        ahead[r] = max(ahead[r], live[step])
    phase = regions - 1
    for step, i in enumerate(schedule.backward, len(schedule.forward)):
        if not joint.forwardable[i]:
            read = [
                region_of[u]
                for u in joint.inputs[i]
                if joint.forwardable[u] and joint.allocates[u]
            ]
            phase = min(phase, max(read, default=phase))
        behind[phase] = max(behind[phase], live[step])
    return ahead, behind
