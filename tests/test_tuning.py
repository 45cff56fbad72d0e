"""Where a part of a model is trained: eager's gradients, and no byte held that none of them needs.

The forms are those of parameter-efficient tuning; see ``bench.zoo.tuning`` for their sources.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memopt
from bench.plans import eager_held_bytes
from bench.zoo.tuning import FORMS, groups, tuned
from memopt._torch import dynamo_counters
from tests.references import assert_equal_in_float64
from tests.training import gradients, train_step

BUDGETS = (None, "min")


def in_float64(form: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = tuned(form, hidden=64, inter=96, vocab=64, length=32)
    return model.double(), inputs


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_eager_s(form: str, budget: Any) -> None:
    model, inputs = in_float64(form)
    torch._dynamo.reset()
    options = {"lowering": "eager", "memory_budget": budget, "strict": True}
    compiled = torch.compile(model, backend="memopt", options=options)
    loss = train_step(compiled, model, inputs)
    mine = gradients(model)
    expected_loss = train_step(model, model, inputs)
    expected = gradients(model)
    assert mine.keys() == expected.keys()
    assert mine
    assert_equal_in_float64((loss, *mine.values()), (expected_loss, *expected.values()))


def saved_bytes(form: str, **options: Any) -> int:
    """As Inductor's code would hold."""
    report = memopt.plan_for(lambda: tuned(form), device="cpu", options=options)
    (graph,) = report.graphs
    return int(graph.saved_bytes)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "all"])
def test_less_is_held_than_eager_holds_and_than_where_all_is_trained(form: str) -> None:
    held = saved_bytes(form)
    assert held < eager_held_bytes(*tuned(form))
    assert held < saved_bytes("all")


def test_of_frozen_layers_below_the_first_trained_one_nothing_is_held() -> None:
    """Four equal blocks: the last one's share is a quarter of what the blocks hold."""
    head, last = saved_bytes("head"), saved_bytes("last block")
    assert last - head < (saved_bytes("all") - head) / 3


def test_norms_alone_hold_no_input_of_a_linear_layer() -> None:
    """Whose gradients are those of the norms, of four blocks and the last one."""
    hidden, inter = 2 * 128 * 128 * 4, 2 * 128 * 352 * 4
    assert saved_bytes("all") - saved_bytes("norms") >= 4 * (inter + hidden)


def test_a_quarter_of_a_layer_s_input_is_held_for_a_quarter_of_its_columns() -> None:
    held, whole = (
        saved_bytes("sub-matrices", passes={"narrow_products": on}) for on in (True, False)
    )
    assert held < whole


def test_one_group_a_step_is_compiled_once_for_each() -> None:
    """HiFT trains the blocks in turn; a second round finds all its code."""
    model, inputs = in_float64("all")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="memopt", options={"lowering": "eager"})
    parts = [*groups(model)]
    known = dynamo_counters["stats"]["unique_graphs"]
    compilations = []
    for _ in range(2):
        for part in parts:
            model.requires_grad_(False)
            for parameter in part:
                parameter.requires_grad_(True)
            loss = train_step(compiled, model, inputs)
            mine = gradients(model)
            expected_loss = train_step(model, model, inputs)
            expected = gradients(model)
            assert mine.keys() == expected.keys()
            assert_equal_in_float64((loss, *mine.values()), (expected_loss, *expected.values()))
        compilations.append(dynamo_counters["stats"]["unique_graphs"] - known)
    assert compilations[0] == len(parts) == compilations[1]
