"""Two ways to choose a level per region: greedy along the hull, and exactly with HiGHS.

Both are deterministic: HiGHS is bounded in nodes, and its clock is a safety net only. Both have
one signature, ``(tables, budget_bytes, seconds) -> choice or None``, and see the step through
``Tables``: what they return is evaluated exactly by the planner.
"""

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, vstack

from memopt.planner.regions import Tables

Choice = list[int]


def solve_greedy(tables: Tables, budget_bytes: float, seconds: float = 0.0) -> Choice | None:
    """Start from the lowest peak; take the best seconds per byte while the budget holds.

    The starting point is the uniform level of least peak.
    """
    regions, levels = tables.seconds.shape
    peaks = [tables.peak([level] * regions) for level in range(levels)]
    choice = [int(np.argmin(peaks))] * regions
    if tables.peak(choice) > budget_bytes:
        return None
    rows = np.arange(regions)
    while True:
        stalls = _stalls_after_each_change(tables, choice)
        gain = tables.seconds[rows, choice][:, None] - tables.seconds
        gain += stalls[rows, choice][:, None] - stalls
        extra = tables.saved_bytes - tables.saved_bytes[rows, choice][:, None]
        rate = np.where(gain > 0, gain / np.maximum(extra, 1.0), 0.0)
        for flat in np.argsort(-rate, axis=None, kind="stable"):
            r, level = divmod(int(flat), levels)
            if rate[r, level] <= 0:
                return choice
            before, choice[r] = choice[r], level
            if tables.peak(choice) <= budget_bytes:
                break
            choice[r] = before
        else:
            return choice


def _stalls_after_each_change(tables: Tables, choice: Choice) -> npt.NDArray[np.float64]:
    """Seconds that copies are waited for with another level in one region, by region and level."""
    regions, levels = tables.seconds.shape
    rows = np.arange(regions)
    away = tables.link_seconds[rows, choice]
    if not tables.link_seconds.any():
        return np.zeros((regions, levels))
    changed = np.broadcast_to(away, (regions, levels, regions)).copy()
    changed[rows, :, rows] = tables.link_seconds
    return tables.stall(changed)


def solve_exact(tables: Tables, budget_bytes: float, seconds: float = 2.0) -> Choice | None:
    """Mixed-integer program: one level per region, every phase of the step under the budget."""
    result = _milp(tables, budget_bytes, tables.seconds, seconds, minimise_peak=False)
    return None if result is None else result[0]


def lowest_peak(tables: Tables, seconds: float = 2.0) -> Choice | None:
    """The mix of least peak, whatever its time."""
    result = _milp(tables, float("inf"), tables.seconds, seconds, minimise_peak=True)
    return None if result is None else result[0]


def _milp(
    tables: Tables,
    budget_bytes: float,
    cost: npt.NDArray[np.float64],
    seconds: float,
    *,
    minimise_peak: bool,
) -> tuple[Choice, float] | None:
    """Which level each region takes.

    Variables: ``z[r, l]`` in {0, 1}; the peak in MiB; seconds waited for copies to the host, and
    back. Rows: one level per region; the peak of every phase, and what repeats hold; the copies of
    what regions from each on hold on the host, and the time that the step runs beside them.
    """
    regions, levels = cost.shape
    size = regions * levels
    unit = 2.0**20
    one = csr_array(np.kron(np.eye(regions), np.ones((1, levels))))
    before = np.tril(np.ones((regions, regions)), -1) + tables.others
    before = np.kron(before, np.ones((1, levels)))
    before *= tables.saved_bytes.reshape(1, size)
    rows = []
    for own in (tables.forward_bytes, tables.backward_bytes):
        here = np.kron(np.eye(regions), np.ones((1, levels))) * own.reshape(1, size)
        rows.append(csr_array((before + here) / unit))
    peaks = vstack(rows)
    scale = max(float(cost.max()), float(tables.link_seconds.max()), 1e-12)
    onwards = np.kron(np.triu(np.ones((regions, regions))), np.ones((1, levels)))
    copied = csr_array(onwards * tables.link_seconds.reshape(1, size) / scale)
    beside = np.concatenate(tables.beside) / scale
    peak, out, back = (csr_array(-np.eye(3)[[row] * regions]) for row in range(3))
    constraints = [
        LinearConstraint(hstack([one, csr_array((regions, 3))]), 1, 1),
        LinearConstraint(
            hstack([peaks, vstack([peak, peak])]),
            -np.inf,
            -tables.others * tables.output_bytes / unit,
        ),
    ]
    if tables.link_seconds.any():
        waits = hstack([vstack([copied, copied]), vstack([out, back])])
        constraints.append(LinearConstraint(waits, -np.inf, beside))
    time = np.append(cost.reshape(size) / scale, [0.0, 1.0, 1.0])
    objective = np.eye(size + 3)[size] if minimise_peak else time
    result = milp(
        objective,
        constraints=constraints,
        integrality=np.append(np.ones(size), [0, 0, 0]),
        bounds=Bounds(0, np.append(np.ones(size), [budget_bytes / unit, np.inf, np.inf])),
        options={"time_limit": max(seconds, 0.1), "mip_rel_gap": 0.01, "node_limit": 400},
    )
    if result.x is None:
        return None
    chosen = result.x[:size].reshape(regions, levels)
    return [int(level) for level in np.argmax(chosen, axis=1)], float(result.x[size]) * unit
