"""The chunked-loss pass on every causal language model of transformers."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx

from bench.zoo.families import CAUSAL_LMS, Family, trains_in_eager
from memopt.backend import compile_graph, read_options
from memopt.record import GraphRecord
from tests.training import assert_trains_within_reference_error, in_float64

# Heads and losses with a form of their own.
UNMATCHED = {
    "dory": "a trained factor per class",
    "musicgen": "graph breaks between one head per codebook and their losses",
    "musicgen_melody": "graph breaks between one head per codebook and their losses",
}


def matched(family: Family) -> bool:
    """Whether the pass fires; whether or not, gradients must be as near to float64 as eager's."""
    model, _ = family.make(vocab=512)
    exact = copy.deepcopy(model).double()
    own_experts: Any = getattr(exact, "set_experts_implementation", None)
    if own_experts is not None:
        own_experts("eager")  # the grouped product has no float64
    records: list[GraphRecord] = []
    config = read_options({"lowering": "eager", "strict": True})

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_graph(gm, example_inputs, config, records.append)

    compiled = torch.compile(model, backend=backend)
    draws = (family.make(seed, vocab=512)[1] for seed in range(2))
    sides = (compiled, model), (in_float64(exact), exact), (model, model)
    assert_trains_within_reference_error(*sides, draws)
    return any(record.rewrites["chunk_losses"] for record in records)


@pytest.mark.parametrize("name", ["gemma2", "mamba", "phimoe", "granite", "gpt2", "doge"])
def test_softcaps_factors_scans_and_routers_are_matched(name: str) -> None:
    (family,) = (f for f in CAUSAL_LMS if f.name == name)
    assert matched(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", CAUSAL_LMS, ids=lambda family: family.name)
def test_every_family_has_eagers_gradients_and_is_matched(family: Family) -> None:
    if reason := trains_in_eager(family):
        pytest.skip(f"does not train in eager: {reason}")
    torch._dynamo.reset()
    assert matched(family) == (family.name not in UNMATCHED)


def test_nearly_every_family_is_one_that_is_matched() -> None:
    assert len(UNMATCHED) <= 0.02 * len(CAUSAL_LMS)
