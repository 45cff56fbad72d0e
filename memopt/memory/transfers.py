"""When copies to the host and back run beside a step, and what they make it wait for.

A link has an engine for each direction, which takes one copy after the other. A copy to the host
starts when its value is made, and the value stays on the device until it ends. A copy back starts
as late as the copies behind it allow, and its value is on the device from then on. Where a copy
is late, the step waits.

Sources: vDNN (Rhu et al. 2016, arXiv:1602.08124) for what is copied beside what; each copy back
as late as the later ones allow is scheduling by latest deadlines (Lawler, 1973).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from memopt.joint import Encoding
from memopt.memory.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Link:
    """Between a device and its host, or a disk of it.

    Attributes:
        bandwidth: bytes per second, in each direction.
        host_bytes: what may lie at its other end, or None for all that there is room for.
    """

    bandwidth: float
    host_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Trip:
    """A value that leaves the device and comes back.

    Attributes:
        seconds: of a copy in either direction.
        made: the step that makes it.
        read: the first step that reads it again.
    """

    seconds: float
    made: int
    read: int


@dataclass(frozen=True, slots=True)
class Stay:
    """When a value with a trip is on the device, besides when steps use it.

    Attributes:
        last: the step during which its copy to the host ends.
        first: the step during which its copy back starts.
    """

    last: int
    first: int


def schedule_trips(
    seconds: Sequence[float], boundary: int, trips: Sequence[Trip]
) -> tuple[list[Stay], float]:
    """Time every copy of a step.

    Args:
        seconds: of each step, by itself.
        boundary: the first step of the backward; by then every copy to the host has ended.
        trips: the values, in any order.

    Returns:
        When each value is on the device; the seconds that the step waits for copies.
    """
    ends = [*accumulate(seconds)]
    starts = [0.0, *ends[:-1]]
    left, engine = [0.0] * len(trips), 0.0
    for i in sorted(range(len(trips)), key=lambda i: (trips[i].made, i)):
        engine = max(engine, ends[trips[i].made]) + trips[i].seconds
        left[i] = engine
    turn = starts[boundary] if boundary < len(starts) else ends[-1]
    waited = max(0.0, engine - turn)
    back, due = [0.0] * len(trips), float("inf")
    for i in sorted(range(len(trips)), key=lambda i: (-trips[i].read, -i)):
        due = min(due, starts[trips[i].read]) - trips[i].seconds
        back[i] = max(due, turn)
    engine = late = 0.0
    for i in sorted(range(len(trips)), key=lambda i: (trips[i].read, i)):
        engine = max(engine, back[i] + late) + trips[i].seconds
        late = max(late, engine - starts[trips[i].read])
    stays = [
        Stay(
            last=max(trip.made, min(bisect_left(ends, left[i]), boundary - 1)),
            first=min(trip.read, max(bisect_right(starts, back[i]) - 1, boundary)),
        )
        for i, trip in enumerate(trips)
    ]
    return stays, waited + late


def place_copies(
    schedule: Schedule, offloaded: Mapping[Encoding, float], seconds: Sequence[float]
) -> tuple[Schedule, float]:
    """Start each copy back as early as the link needs, and hold each value until it has left.

    Args:
        schedule: each copy back stands right before its first reader.
        offloaded: the values that are held on the host, each with the seconds of a copy.
        seconds: of each node.

    Returns:
        The schedule; the seconds that the step waits for copies.
    """
    boundary, order = len(schedule.forward), (*schedule.forward, *schedule.backward)
    made = {i: at for at, i in enumerate(schedule.forward)}
    read = {i: at for at, i in enumerate(schedule.backward, boundary)}
    trips = [Trip(copy, made[e.encoded], read[e.decoded]) for e, copy in offloaded.items()]
    stays, waited = schedule_trips([seconds[i] for i in order], boundary, trips)
    starting: dict[int, list[int]] = {}
    for _, first, decoded in sorted(
        (trip.read, stay.first, e.decoded)
        for e, trip, stay in zip(offloaded, trips, stays, strict=True)
    ):
        starting.setdefault(first, []).append(decoded)
    moved = {e.decoded for e in offloaded}
    backward: list[int] = []
    for at, i in enumerate(schedule.backward, boundary):
        backward += [*starting.get(at, ()), *([] if i in moved else [i])]
    leaves = {e.source: stay.last for e, stay in zip(offloaded, stays, strict=True)}
    return replace(schedule, backward=tuple(backward), leaves=leaves), waited
