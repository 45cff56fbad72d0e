"""Chooses what each half keeps: the least extra time whose peak stays under the budget.

(1) Sweep the price of a byte: each price gives, by one minimum cut, a *level*: the cheapest
saved set at that price. Per-block checkpoints are levels too. (2) Mix levels by region: greedy
along the hull, refined by HiGHS. (3) Evaluate the mix exactly; if it is over, tighten the tables'
budget by the overshoot and solve again. (4) Spend what is left: save again what is dearest to
recompute, while it fits.

Sources: the hull and the multiplier are Lagrangian relaxation (Everett, 1963); keeping or
recomputing under a memory bound as a mixed-integer program is Checkmate (Jain et al., 2020);
solving it by block is Rockmate (Zhao et al., 2023); a knapsack over saved bytes is torch's
``activation_memory_budget``, which bounds saved bytes and not the peak.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np

from memopt.planner.problem import Candidate, Problem
from memopt.planner.regions import Regions, Tables, find_regions, tabulate
from memopt.planner.solve import lowest_peak, solve_exact, solve_greedy

# Bounds on the work, so that the plan does not depend on how fast the machine is. The clock is a
# safety net for very large graphs only.
_MAX_LEVELS = 24
_LINK_LEVELS = 8
_MAX_TIGHTEN = 6
_MAX_SPENDS = 28
_MAX_DESCENT = 60
_CLEARLY_LOWER = 0.9
_CLEARLY_DEARER = 2.0
# What a value's way to the host and back is worth: nothing where the link is idle, and at most the
# time that it takes, where every copy is waited for.
_LINK_SHARES = (0.0, 0.05, 0.3, 2.0)


class Search:
    """One planning session over one problem; remembers levels and tables.

    Args:
        problem: the priced graph.
        fastest: a saved set known to be fast, such as a stock partition's; None to find one.
        solver: ``"auto"``, ``"greedy"`` or ``"exact"``.
        time_limit: seconds of this thread's work that searching may take beyond the sweep: what
            else the machine does changes no plan.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        fastest: Iterable[int] | None = None,
        solver: str = "auto",
        time_limit: float = 5.0,
    ) -> None:
        self.problem = problem
        self.solver = solver
        self.time_limit = time_limit
        self.deadline = time.thread_time() + time_limit
        self.everything_kept = problem.keep_everything()
        if fastest is None:
            self.fastest = problem.evaluate(problem.cut(lambda i: 0.0), "fastest")
        else:
            self.fastest = problem.evaluate(fastest, "fastest")
        self._tables: Tables | None = None

    def plan(self, budget_bytes: int | None) -> Candidate | None:
        """The least extra time under the budget; None if nothing found fits.

        Args:
            budget_bytes: bound on the peak, or None for what can be had for no time at all.
        """
        if budget_bytes is None:
            return self.free
        if self.fastest.peak_bytes <= budget_bytes:
            return self.fastest
        uniform = [c for c in (*self.levels, *self.checkpoints) if c.peak_bytes <= budget_bytes]
        mixed = [*self._mixed(budget_bytes)]
        # What is fast has little left to spend; what is low has more, for other values.
        ranked = ((uniform + mixed, _cost), (uniform, _height))
        starts = [min(found, key=rank) for found, rank in ranked if found]
        if not starts and self.floor.peak_bytes <= budget_bytes:
            starts = [self.floor]
        self.deadline = max(self.deadline, time.thread_time() + self.time_limit)
        spent = [self._spend(start, budget_bytes) for start in starts]
        return min(spent, key=_cost, default=None)

    @cached_property
    def free(self) -> Candidate:
        """The level of least peak that takes no longer than the saved set known to be fast.

        Nor does it recompute more: bytes that are not saved gain less time than the model says
        where caches hold them. A peak that is lower by less than the model may be wrong is not
        worth a change.
        """
        fastest = self.fastest
        found = [
            c
            for c in self.levels
            if c.seconds <= fastest.seconds
            and c.recompute_seconds <= fastest.recompute_seconds
            and c.peak_bytes <= _CLEARLY_LOWER * fastest.peak_bytes
        ]
        return min(found, key=lambda c: (c.peak_bytes, c.seconds), default=self.fastest)

    @cached_property
    def floor(self) -> Candidate:
        """The plan of least peak that the search can find; has a time limit of its own."""
        self.deadline = max(self.deadline, time.thread_time() + self.time_limit)
        tables = self.tables
        starts = [min(c, key=_height) for c in (self.levels, self.checkpoints) if c]
        choice = lowest_peak(tables, self._left())
        if choice is not None:
            starts.append(self.problem.evaluate(tables.mix(choice), "lowest peak"))
        # One kind of plan is stuck where another still has a way down.
        low = min(map(self._descend, sorted(starts, key=_height)), key=_height)
        for _ in range(_MAX_TIGHTEN):
            lower = next(iter(self._mixed(low.peak_bytes - 1)), None)
            if lower is None or lower.peak_bytes >= low.peak_bytes:
                break
            low = lower
        return low

    def _descend(self, start: Candidate) -> Candidate:
        """Local search on the peak: save one more, one less, or one instead of another."""
        problem, best, trials = self.problem, start, 0
        improved = True
        while improved and trials < _MAX_DESCENT and self._left() > 0:
            improved = False
            for move in self._moves(best):
                trials += 1
                trial = problem.evaluate(best.saved ^ move, "descent")
                if trial.peak_bytes < best.peak_bytes:
                    best, improved = trial, True
                    break
                if trials >= _MAX_DESCENT or self._left() <= 0:
                    break
        return best

    def _moves(self, candidate: Candidate) -> Iterator[frozenset[int]]:
        """Changes to a saved set that touch what is alive at its peak, largest first."""
        problem = self.problem
        joint, liveness = problem.joint, candidate.liveness
        live = liveness.live_bytes
        peak = live.index(max(live)) if live else 0
        alive = {s for s, first, last in liveness.lives if first <= peak <= last}
        if problem.others:  # of the others, all that is saved is alive
            alive |= problem.saved_storages(candidate.saved)
        drop = [i for i in candidate.saved if not alive.isdisjoint(joint.storage_of[i])]
        savable = [
            i
            for i, nbytes in enumerate(problem.save_bytes)
            if 0 < nbytes < float("inf") and i not in candidate.saved
        ]
        drop.sort(key=lambda i: (-problem.save_bytes[i], i))
        savable.sort(key=lambda i: (problem.save_bytes[i], i))
        yield from (frozenset((i,)) for i in drop)
        yield from (frozenset((i,)) for i in savable)
        yield from (frozenset((i, j)) for i in drop for j in savable)

    @property
    def tables(self) -> Tables:
        """Levels by price of a byte, tabulated by region; made when first needed."""
        if self._tables is None:
            levels = [*self.levels, *self.checkpoints, *self._link_levels()]
            self._tables = tabulate(self.problem, self.regions.of, levels)
            self.deadline = time.thread_time() + self.time_limit
        return self._tables

    def _mixed(self, budget_bytes: int) -> Iterator[Candidate]:
        """(2) and (3): mixes that an exact evaluation confirms."""
        solvers = {"greedy": [solve_greedy], "exact": [solve_exact]}.get(
            self.solver, [solve_greedy, solve_exact]
        )
        for solve in solvers:
            target = float(budget_bytes)
            for _ in range(_MAX_TIGHTEN):
                if self._left() <= 0:
                    break
                choice = solve(self.tables, target, self._left())
                if choice is None:
                    break
                candidate = self.problem.evaluate(self.tables.mix(choice), solve.__name__)
                if candidate.peak_bytes <= budget_bytes:
                    yield candidate
                    break
                target -= candidate.peak_bytes - budget_bytes

    @cached_property
    def levels(self) -> Sequence[Candidate]:
        """(1) Bisect the price of a byte, in its logarithm, where the saved set changes."""
        problem = self.problem
        low, high = self._prices()
        sets: dict[frozenset[int], float] = {self.fastest.saved: 0.0}
        first, last = problem.cut(lambda i: low), problem.cut(lambda i: high)
        sets.setdefault(first, low)
        sets.setdefault(last, high)
        todo = [(low, first, high, last)]
        while todo and len(sets) < _MAX_LEVELS:
            a, at_a, b, at_b = todo.pop(0)
            if at_a == at_b or b / a < 1.05:
                continue
            middle = (a * b) ** 0.5
            at_middle = problem.cut(lambda i, price=middle: price)  # type: ignore[misc]
            sets.setdefault(at_middle, middle)
            todo += [(a, at_a, middle, at_middle), (middle, at_middle, b, at_b)]
        found = [problem.evaluate(s, f"price {p:.1e} s/B") for s, p in sets.items()]
        self.deadline = time.thread_time() + self.time_limit
        return [self.everything_kept, *found]

    @cached_property
    def regions(self) -> Regions:
        """Of the forward."""
        return find_regions(self.problem)

    @cached_property
    def checkpoints(self) -> Sequence[Candidate]:
        """Per-block checkpointing, by how many regions are a block."""
        crossings = self.regions.checkpoints()
        return [self.problem.evaluate(crossing, "checkpoints") for crossing in crossings]

    def _prices(self) -> tuple[float, float]:
        """Seconds per byte at which nothing, and at which everything, is worth recomputing."""
        problem = self.problem
        priced = [
            t / b
            for t, b in zip(problem.seconds, problem.save_bytes, strict=True)
            if t > 0 and 0 < b < float("inf")
        ]
        return (min(priced) / 10, max(priced) * 10) if priced else (1e-12, 1e-6)

    def _link_levels(self) -> list[Candidate]:
        """Saved sets with values on the host, as with a link that is never waited for.

        A region that holds all it can there is what a mix is made of; the tables say which copies
        are waited for.
        """
        problem = self.problem
        if not problem.links:
            return []
        sets: dict[frozenset[int], float] = {}
        for share in _LINK_SHARES:
            for price in np.geomspace(*self._prices(), _LINK_LEVELS):
                sets.setdefault(problem.cut(lambda i, p=price: p, share), price)  # type: ignore[misc]
        known = {level.saved for level in self.levels}
        return [
            problem.evaluate(s, f"price {p:.1e} s/B", waits=False)
            for s, p in sets.items()
            if s not in known
        ]

    def _spend(self, start: Candidate, budget_bytes: int) -> Candidate:
        """(4) Save more, what is dearest per byte first, in batches that adapt.

        Dear is what is recomputed, or held in another form: if making that form takes clearly
        longer than to write and read back the value itself. A gain smaller than the model may be
        wrong is not worth the bytes.
        """
        problem, best = self.problem, start
        seconds = {i: problem.seconds[i] for i in best.liveness.schedule.recomputed}
        for encoding in problem.joint.encodings:
            held = problem.holding_seconds(encoding)
            plain = problem.cost.traffic_seconds(1) * problem.save_bytes[encoding.source]
            if encoding.encoded in best.saved and held > _CLEARLY_DEARER * plain:
                seconds[encoding.source] = held
        wanted = sorted(
            (i for i in seconds if 0 < problem.save_bytes[i] < float("inf")),
            key=lambda i: (-seconds[i] / problem.save_bytes[i], i),
        )
        batch = max(1, len(wanted) // 2)
        at = spends = 0
        while at < len(wanted) and spends < _MAX_SPENDS and self._left() > 0:
            spends += 1
            trial = problem.evaluate(best.saved | set(wanted[at : at + batch]), best.origin)
            if trial.peak_bytes <= budget_bytes and trial.seconds < best.seconds:
                best, at, batch = trial, at + batch, 2 * batch
            elif batch > 1:
                batch = (batch + 1) // 2
            else:
                at += 1
        return best

    def _left(self) -> float:
        return self.deadline - time.thread_time()


def _cost(candidate: Candidate) -> tuple[float, int]:
    return candidate.seconds, candidate.peak_bytes


def _height(candidate: Candidate) -> tuple[int, float]:
    return candidate.peak_bytes, candidate.seconds
