"""The search against all that there is, on small problems."""

import itertools

import numpy as np
import pytest

from memopt.attention.search import Candidates, choose
from memopt.errors import ConfigError

RULES, HEADS, LENGTHS = 5, 3, 2


def drawn(seed: int, layers: int = 2) -> list[Candidates]:
    """Rules that see more lose less; how much, each head decides."""
    random = np.random.default_rng(seed)
    density = np.sort(random.uniform(0.05, 1, (RULES, LENGTHS)), axis=0)
    density[0], density[-1] = 0.05, 1
    return [
        Candidates(
            np.sort(random.exponential(1, (RULES, HEADS)), axis=0)[::-1]
            * random.exponential(1, HEADS) * (density[:, :1] < 1),
            density,
        )
        for _ in range(layers)
    ]  # fmt: skip


def best(layers: list[Candidates], budget: float) -> float:
    """The least loss of all assignments with at most two rules in a layer."""
    one = [c for c in itertools.product(range(RULES), repeat=HEADS) if len(set(c)) <= 2]
    heads = HEADS * len(layers)
    return min(
        sum(layer.loss_of(c) for layer, c in zip(layers, chosen, strict=True))
        for chosen in itertools.product(one, repeat=len(layers))
        if np.all(
            np.sum([a.density_of(c) for a, c in zip(layers, chosen, strict=True)], axis=0)
            <= heads * (budget + 1e-9)
        )
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_it_is_close_to_the_best_of_all(seed: int, share: float) -> None:
    layers = drawn(seed)
    least = max(layers[0].density[0])
    budget = least + share * (1 - least)
    chosen = choose(layers, budget)
    lost = sum(layer.loss_of(c) for layer, c in zip(layers, chosen, strict=True))
    everything = sum(layer.lost.max(0).sum() for layer in layers)
    assert lost <= best(layers, budget) + 0.01 * everything


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8, 1.0])
def test_the_budget_holds_at_every_length_with_two_rules_in_a_layer(budget: float) -> None:
    layers = drawn(7, layers=6)
    chosen = choose(layers, budget)
    heads = HEADS * len(layers)
    read = [layer.density_of(c) for layer, c in zip(layers, chosen, strict=True)]
    density = np.sum(read, axis=0) / heads
    assert (density <= budget + 1e-6).all()
    assert all(len(set(c)) <= 2 for c in chosen)


def test_with_room_for_everything_nothing_is_lost() -> None:
    layers = drawn(3)
    assert sum(layer.loss_of(c) for layer, c in zip(layers, choose(layers, 1.0), strict=True)) == 0


@pytest.mark.parametrize("seed", range(4))
def test_of_one_length_it_is_the_best_of_all(seed: int) -> None:
    layers = [Candidates(layer.lost, layer.density[:, :1]) for layer in drawn(seed)]
    chosen = choose(layers, 0.5)
    lost = sum(layer.loss_of(c) for layer, c in zip(layers, chosen, strict=True))
    assert lost <= best(layers, 0.5) * (1 + 1e-3)


def test_of_rules_that_lose_nothing_the_sparser_is_taken() -> None:
    density = np.array([[1.0], [0.5], [0.1]])
    layer = Candidates(np.zeros((3, 2)), density)
    assert choose([layer], 1.0) == [(2, 2)]


def test_a_budget_below_the_least_density_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"least density is 0\.\d+"):
        choose(drawn(0), 0.01)
