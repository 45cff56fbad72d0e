"""Random models do under memopt what they do in eager, within the bytes that were promised.

A failure is replayed, and cut down to the steps that it needs, by
``python -m tests.fuzz --seed SEED --shrink``.
"""

import collections

import pytest
import torch

from tests.fuzz.cases import KINDS, Case, Kind
from tests.fuzz.checks import check

FAILURES = ("wrong", "crash", "memory")
TO_BE_COMPARED = 0.8  # of the models: torch's own compiler fails at some, as do their numbers


def assert_as_eager(seeds: range, lowering: str = "eager", kind: Kind = "float64") -> None:
    """All models with these numbers."""
    kinds: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        verdict = check(Case(seed, kind=kind), lowering=lowering)
        assert verdict.kind not in FAILURES, f"seed {seed}: {verdict.kind}: {verdict.detail}"
        kinds[verdict.kind] += 1
        torch._dynamo.reset()
    assert kinds["same"] >= TO_BE_COMPARED * len(seeds), kinds


@pytest.mark.parametrize("first", range(0, 16, 8))
def test_a_few_random_models(first: int) -> None:
    assert_as_eager(range(first, first + 8))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_few_random_models_of_other_numbers(kind: Kind) -> None:
    assert_as_eager(range(2, 5), kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("first", range(100, 200, 20))
def test_hundreds_of_random_models_of_other_numbers(first: int, kind: Kind) -> None:
    assert_as_eager(range(first, first + 20), kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 1100, 20))
def test_a_thousand_random_models(first: int) -> None:
    assert_as_eager(range(first, first + 20))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(2000, 2030, 15))
def test_random_models_by_inductor(first: int) -> None:
    assert_as_eager(range(first, first + 15), "inductor")
