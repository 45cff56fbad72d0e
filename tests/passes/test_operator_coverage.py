"""Norms, gates and rotary embeddings of every causal language model of transformers are found."""

import copy
from typing import Any

import pytest
import torch

from bench.coverage import OPERATORS, Coverage, count, measure, row
from bench.coverage_page import page, told_share
from bench.results import header
from bench.zoo.families import CAUSAL_LMS, Family
from tests.training import assert_trains_within_reference_error, in_float64

BY_NAME = {family.name: family for family in CAUSAL_LMS}
# Norms, gates and rotary embeddings, of which all are matched.
WHOLE = {
    "llama": (5, 2, 4),
    "gemma2": (9, 2, 4),
    "olmo2": (9, 2, 4),
    "cohere": (3, 2, 4),
    "qwen3": (9, 2, 4),
    "glm4": (9, 2, 4),
    "deepseek_v3": (9, 3, 4),
    "gpt2": (5, 0, 0),
    "gpt_neox": (5, 0, 4),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_operator_of_a_usual_family_is_matched(name: str) -> None:
    found = measure(BY_NAME[name])
    assert tuple(found[operator].instances for operator in OPERATORS) == WHOLE[name]
    assert all(own.matched >= own.instances for own in found.values()), found


def test_what_is_not_matched_has_a_reason() -> None:
    gate = measure(BY_NAME["deepseek_v4"])["gate"]
    assert gate.instances
    assert not gate.matched
    assert gate.told == gate.instances
    assert any("is made in a loop" in reason for reason in gate.declined)


def test_instances_are_counted_without_the_passes() -> None:
    module, inputs = BY_NAME["llama"].make()
    assert count(module, inputs) == {"norm": 5, "gate": 2, "rotary": 4}


def test_no_more_is_told_than_there_is() -> None:
    own = Coverage(instances=3, matched=2)
    own.declined["a reason"] = 4
    assert own.told == 3


def test_the_page_tells_what_was_not_counted() -> None:
    nothing = row(Family("llama", "NoSuchForCausalLM"))
    assert nothing["status"].startswith("AttributeError")
    text = page(header(0, "cpu") | {"rows": [row(BY_NAME["gpt2"]), nothing]})
    assert "| gpt2 | 5 | - | - |" in text
    assert "| llama | AttributeError" in text


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "glm4", "gpt_neox", "youtu"])
def test_a_family_trains_as_eager_does(family: str) -> None:
    model, _ = BY_NAME[family].make()
    exact = copy.deepcopy(model).double()
    passes = {name: {"cpu": True} for name in ("fuse_norms", "fuse_gates", "fuse_rotary")}
    options: dict[str, Any] = {"lowering": "eager", "strict": True, "passes": passes}
    fused = torch.compile(model, backend="memopt", options=options)
    draws = (BY_NAME[family].make(seed)[1] for seed in range(2))
    sides = (fused, model), (in_float64(exact), exact), (model, model)
    assert_trains_within_reference_error(*sides, draws)


@pytest.mark.slow
def test_nearly_every_instance_is_matched_or_declined_with_a_reason() -> None:
    rows = [own for own in map(row, CAUSAL_LMS) if own["status"] == "ok"]
    assert len(rows) >= 0.9 * len(CAUSAL_LMS)
    for operator in OPERATORS:
        assert told_share(rows, operator) >= 0.95, operator
