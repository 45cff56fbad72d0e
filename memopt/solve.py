"""Two ways to choose a level per region: greedy along the hull, and exactly with HiGHS.

Both are deterministic: HiGHS is bounded in nodes, and its clock is a safety net only. Both have
one signature, ``(tables, budget_bytes, seconds) -> choice or None``, and see the step through
``Tables``: what they return is evaluated exactly by the planner.
"""

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack, vstack

from memopt.regions import Tables

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
        gain = tables.seconds[rows, choice][:, None] - tables.seconds
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
    """Variables: ``z[r, l]`` in {0, 1}, and the peak in MiB. Rows: one level per region; peak."""
    regions, levels = cost.shape
    size = regions * levels
    unit = 2.0**20
    one = csr_array(np.kron(np.eye(regions), np.ones((1, levels))))
    before = np.kron(np.tril(np.ones((regions, regions)), -1), np.ones((1, levels)))
    before *= tables.saved_bytes.reshape(1, size)
    rows = []
    for own in (tables.forward_bytes, tables.backward_bytes):
        here = np.kron(np.eye(regions), np.ones((1, levels))) * own.reshape(1, size)
        rows.append(csr_array((before + here) / unit))
    peaks = vstack(rows)
    last = csr_array(-np.ones((2 * regions, 1)))
    constraints = [
        LinearConstraint(hstack([one, csr_array((regions, 1))]), 1, 1),
        LinearConstraint(hstack([peaks, last]), -np.inf, 0),
    ]
    scale = max(float(cost.max()), 1e-12)
    objective = np.append(np.zeros(size) if minimise_peak else cost.reshape(size) / scale, 0.0)
    if minimise_peak:
        objective[-1] = 1.0
    result = milp(
        objective,
        constraints=constraints,
        integrality=np.append(np.ones(size), 0),
        bounds=Bounds(0, np.append(np.ones(size), budget_bytes / unit)),
        options={"time_limit": max(seconds, 0.1), "mip_rel_gap": 0.01, "node_limit": 400},
    )
    if result.x is None:
        return None
    chosen = result.x[:size].reshape(regions, levels)
    return [int(level) for level in np.argmax(chosen, axis=1)], float(result.x[-1]) * unit
