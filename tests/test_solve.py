"""Greedy and exact choices of a level per region, against all choices on small tables."""

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.planner.regions import Tables
from memopt.planner.solve import Choice, lowest_peak, solve_exact, solve_greedy

MIB = 2**20
GAP = 0.005  # the relative gap at which the mixed-integer solver may stop
FEASIBLE = 64  # bytes: the solver counts MiB and meets a row to about 1e-6 of one, per term


@st.composite
def tables(draw: st.DrawFn) -> Tables:
    """Up to four regions by four levels, of whole MiB; level 0 keeps most and recomputes none."""
    regions, levels = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def column(most: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        size = regions * levels
        values = draw(st.lists(st.integers(0, most), min_size=size, max_size=size))
        return np.array(values, dtype=np.float64).reshape(regions, levels)

    saved, seconds = column(20) * MIB, column(9) * 1e-3
    linked = draw(st.booleans())
    return Tables(
        levels=(),
        region_of=np.arange(regions),
        seconds=np.sort(seconds, axis=1),
        link_seconds=column(9 * linked) * 1e-3,
        running=column(6)[:, 0] * 1e-3,
        saved_bytes=-np.sort(-saved, axis=1),
        forward_bytes=saved + column(10) * MIB,
        backward_bytes=saved + column(20) * MIB,
        others=draw(st.integers(0, 2)),
        output_bytes=draw(st.integers(0, 3)) * MIB,
    )


def choices(t: Tables) -> list[Choice]:
    regions, levels = t.seconds.shape
    return [list(c) for c in itertools.product(range(levels), repeat=regions)]


def seconds(t: Tables, choice: Choice) -> float:
    """Of the work, and of waiting for copies in both directions."""
    away = [t.link_seconds[r, level] for r, level in enumerate(choice)]
    waits = [
        max(
            0.0, *(sum(away[r:]) - share * sum(t.running[r + skipped :]) for r in range(len(away)))
        )
        for share, skipped in ((1, 0), (2, 1))
    ]
    return math.fsum([*(t.seconds[r, level] for r, level in enumerate(choice)), *waits])


def budget_of(t: Tables, fraction: float) -> float:
    peaks = [t.peak(c) for c in choices(t)]
    return min(peaks) + fraction * (max(peaks) - min(peaks))


@settings(max_examples=60)
@given(tables(), st.floats(0, 1))
def test_the_exact_solver_finds_the_optimum(t: Tables, fraction: float) -> None:
    budget = math.ceil(budget_of(t, fraction) / MIB) * MIB
    best = min(seconds(t, c) for c in choices(t) if t.peak(c) <= budget)
    found = solve_exact(t, budget)
    assert found is not None
    assert t.peak(found) <= budget + FEASIBLE
    assert seconds(t, found) <= best * (1 + GAP) + 1e-12


@settings(max_examples=60)
@given(tables(), st.floats(0, 1))
def test_the_greedy_solver_meets_the_budget_wherever_a_uniform_level_does(
    t: Tables, fraction: float
) -> None:
    budget = budget_of(t, fraction)
    uniform = [c for c in choices(t) if len(set(c)) == 1 and t.peak(c) <= budget]
    found = solve_greedy(t, budget)
    if found is None:
        assert not uniform
        return
    assert t.peak(found) <= budget
    lowest = min(uniform, key=t.peak)
    assert seconds(t, found) <= seconds(t, lowest) + 1e-12
    exact = solve_exact(t, budget + FEASIBLE)
    assert exact is not None
    assert seconds(t, exact) <= seconds(t, found) * (1 + GAP) + 1e-12


@settings(max_examples=60)
@given(tables())
def test_the_lowest_peak_is_the_lowest_of_all_choices(t: Tables) -> None:
    found = lowest_peak(t)
    assert found is not None
    lowest = min(map(t.peak, choices(t)))
    assert t.peak(found) <= lowest * (1 + GAP) + FEASIBLE


@settings(max_examples=30)
@given(tables())
def test_no_solver_answers_a_budget_below_the_lowest_peak(t: Tables) -> None:
    too_little = min(map(t.peak, choices(t))) - MIB
    assert solve_greedy(t, too_little) is None
    assert too_little < 0 or solve_exact(t, too_little) is None
