"""The cut against every saved set there is, on graphs small enough to try them all."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.planner.mincut import SavedSetNetwork
from tests.graphs import ancestors

INFINITE = math.inf
PRICES = st.one_of(
    st.sampled_from([0.0, INFINITE, 1.0, 1.0, 2.0]), st.floats(1e-9, 1e3, allow_nan=False)
)


@dataclass(frozen=True)
class Instance:
    """One problem: edges, what is needed, and two prices per node."""

    inputs: list[list[int]]
    needed: list[int]
    save: list[float]
    recompute: list[float]

    def cost(self, saved: Iterable[int]) -> float:
        """The objective, read off its definition."""
        saved = set(saved)
        again = ancestors(self.inputs, self.needed, stop=saved) - saved
        return sum(self.save[i] for i in saved) + sum(self.recompute[i] for i in again)

    def optimum(self) -> float:
        """The least cost over all saved sets."""
        n = len(self.inputs)
        sets = ([i for i in range(n) if mask >> i & 1] for mask in range(1 << n))
        return min(map(self.cost, sets))

    def rounding(self) -> float:
        """The most that integer capacities can cost: one unit of 2**-29 of all prices per edge."""
        finite = sum(p for p in (*self.save, *self.recompute) if p != INFINITE)
        return 2 * len(self.inputs) * finite / 2**29


@st.composite
def instances(draw: st.DrawFn, most: int = 9) -> Instance:
    n = draw(st.integers(1, most))
    inputs = [
        sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else [] for i in range(n)
    ]
    needed = sorted(draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=4)))
    save = [draw(PRICES) for _ in range(n)]
    return Instance(inputs, needed, save, [draw(PRICES) for _ in range(n)])


def solve(instance: Instance) -> frozenset[int]:
    network = SavedSetNetwork(instance.inputs, instance.needed)
    return network.cheapest(instance.save, instance.recompute)


@settings(max_examples=300)
@given(instances())
def test_no_saved_set_is_cheaper_than_the_cut(instance: Instance) -> None:
    optimum = instance.optimum()
    cost = instance.cost(solve(instance))
    if optimum == INFINITE:
        assert cost == INFINITE
    else:
        assert cost <= optimum + instance.rounding()


@settings(max_examples=100)
@given(instances())
def test_only_what_the_backward_could_use_is_saved(instance: Instance) -> None:
    assert solve(instance) <= ancestors(instance.inputs, instance.needed)


def test_a_value_that_serves_many_is_recomputed_and_paid_for_once() -> None:
    # 0 is resident; 1 costs 3 to make and feeds 2, 3 and 4, which cost 1 each to make.
    inputs = [[], [0], [1], [1], [1]]
    recompute = [INFINITE, 3.0, 1.0, 1.0, 1.0]
    dear = Instance(inputs, [2, 3, 4], [0.0, INFINITE, 2.5, 2.5, 2.5], recompute)
    assert solve(dear) == {0}  # 3 + 1 + 1 + 1 = 6, saving all three is 7.5
    cheap = Instance(inputs, [2, 3, 4], [0.0, INFINITE, 1.9, 1.9, 1.9], recompute)
    assert solve(cheap) == {2, 3, 4}


def test_a_needed_value_that_may_be_neither_saved_nor_recomputed_is_saved() -> None:
    stuck = Instance([[], [0]], [1], [0.0, INFINITE], [INFINITE, INFINITE])
    assert solve(stuck) == {1}


def test_one_hopeless_value_does_not_spoil_the_choice_for_the_others() -> None:
    inputs = [[], [0], [0], [0]]
    hopeless = Instance(inputs, [1, 2, 3], [0, INFINITE, 5, 1], [INFINITE, INFINITE, 1, 5])
    assert solve(hopeless) - {1} == {0, 3}


def test_where_the_backward_needs_nothing_nothing_is_saved() -> None:
    assert solve(Instance([[], [0]], [], [0.0, 1.0], [INFINITE, 1.0])) == frozenset()
