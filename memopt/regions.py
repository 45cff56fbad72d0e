"""Cuts the forward into regions where little crosses, and tabulates what each level costs there.

A *level* is a saved set for the whole graph. A *region* is a stretch of the forward between two
narrow points. A mixed plan gives each region its own level; the tables here price any mix with
one row per phase of the step, from one exact evaluation per level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memopt.graph import OpKind
from memopt.problem import Candidate, Problem

MAX_REGIONS = 64


@dataclass(frozen=True)
class Tables:
    """Prices of a mixed plan, by region ``r`` (rows) and level ``l`` (columns).

    Attributes:
        levels: the uniform plans.
        region_of: region of each joint-graph node.
        seconds: time of recomputing and saving in region ``r`` at level ``l``, and of copies to
            the host and back beyond the time that the region runs, twice as long backwards.
        saved_bytes: bytes that region ``r`` holds across the boundary at level ``l``.
        forward_bytes, backward_bytes: peak while region ``r`` runs, less what earlier regions
            have saved.
    """

    levels: Sequence[Candidate]
    region_of: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]
    saved_bytes: npt.NDArray[np.float64]
    forward_bytes: npt.NDArray[np.float64]
    backward_bytes: npt.NDArray[np.float64]

    def mix(self, choice: Sequence[int]) -> frozenset[int]:
        """The saved set that takes level ``choice[r]`` in region ``r``."""
        return frozenset(
            i
            for level in set(choice)
            for i in self.levels[level].saved
            if choice[self.region_of[i]] == level
        )

    def peak(self, choice: Sequence[int]) -> float:
        """Peak bytes of a mix, as the tables see it."""
        rows = np.arange(len(choice))
        saved = self.saved_bytes[rows, choice]
        before = np.cumsum(saved) - saved
        own = np.maximum(self.forward_bytes[rows, choice], self.backward_bytes[rows, choice])
        return float(np.max(before + own))


def find_regions(problem: Problem) -> npt.NDArray[np.int64]:
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
    edges = sorted(forward[c] for c in cuts)
    return np.searchsorted(np.array(edges, dtype=np.int64), np.arange(len(joint)), side="left")


def tabulate(problem: Problem, levels: Sequence[Candidate]) -> Tables:
    """Read one column per level from its exact evaluation."""
    region_of = find_regions(problem)
    regions = int(region_of.max()) + 1 if len(region_of) else 1
    shape = (regions, len(levels))
    seconds, saved = np.zeros(shape), np.zeros(shape)
    forward, backward = np.zeros(shape), np.zeros(shape)
    joint = problem.joint
    running = np.bincount(region_of, problem.forward_share, regions)
    for column, level in enumerate(levels):
        for i in level.liveness.schedule.recomputed:
            seconds[region_of[i], column] += problem.seconds[i]
        for s in problem.saved_storages(level.saved):
            owner = joint.storages[s].owner
            saved[region_of[owner], column] += joint.storages[s].nbytes
        away = np.zeros(regions)
        for encoding in joint.encodings:
            if encoding.encoded in level.saved:
                r = region_of[encoding.source]
                seconds[r, column] += problem.encoding_seconds[encoding.encoded]
                away[r] += problem.link_seconds(encoding)
        seconds[:, column] += np.maximum(away - running, 0) + np.maximum(away - 2 * running, 0)
        seconds[:, column] += saved[:, column] * problem.cost.traffic_seconds(1)
        before = np.cumsum(saved[:, column]) - saved[:, column]
        ahead, behind = _phase_peaks(level, region_of, regions)
        forward[:, column] = ahead - before
        backward[:, column] = behind - before
    return Tables(levels, region_of, seconds, saved, forward, backward)


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
