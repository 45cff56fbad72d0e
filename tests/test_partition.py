"""The planned halves: the numbers of eager at every budget, and checked against each other."""

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import fx, nn

from memopt.errors import PartitionError
from memopt.graph import aten
from memopt.partition import check_halves, reorder
from tests.graphs import (
    OPERATORS,
    RANDOM,
    Program,
    assert_same,
    lowered,
    programs,
    seeded,
    square,
)

BUDGETS = (None, 0.9, 0.7, 0.5, "min")
Tensor = torch.Tensor


@settings(max_examples=10)
@given(programs(names=(*OPERATORS, *RANDOM)))
def test_outputs_and_gradients_are_those_of_eager_at_every_budget(program: Program) -> None:
    arguments = program.arguments()
    expected = seeded(program, arguments)
    for budget in BUDGETS:
        assert_same(seeded(lowered(program, memory_budget=budget), arguments), expected)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_backward_uses_the_mask_that_the_forward_drew(budget: float | str | None) -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        for _ in range(3):
            x = nn.functional.dropout(x, 0.5, training=True)
        return (x,)

    x = torch.ones(64, 64, dtype=torch.float64, requires_grad=True)
    (y,) = lowered(function, memory_budget=budget)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert 0.05 < (y != 0).double().mean() < 0.25
    assert torch.equal(gradient, y.detach())  # x is 1, so y is the product of the scaled masks


def halves_of(function: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Any, int]:
    """The planned forward and backward, and how many values the user gets."""
    captured = lowered(function, memory_budget="min")
    caught: list[tuple[Any, Any, int]] = []

    def remember(forward: Any, backward: Any, num_fwd_outputs: int) -> None:
        caught.append((forward, backward, num_fwd_outputs))
        check_halves(forward, backward, num_fwd_outputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memopt.partition.check_halves", remember)
        captured(*inputs)
    return caught[0]


def two_layers(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).tanh() @ w).tanh().sum()


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_the_forward_has_checked_is_not_computed_and_checked_again(budget: Any) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        counts = nn.functional.one_hot((x * 1.0).argmax(-1), x.shape[-1])
        y = (counts * w).tanh()
        x.mul_(0.5)  # all that a check in the backward would see
        return (y @ w).tanh().sum()

    w = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
    x = torch.randn(16, 16, dtype=torch.float64)
    (expected,) = torch.autograd.grad(function(x.clone(), w), w)
    captured = lowered(function, memory_budget=budget)
    (gradient,) = torch.autograd.grad(captured(x, w), w)
    torch.testing.assert_close(gradient, expected)
    graphs: list[Any] = []
    compiled = lowered(function, memory_budget=budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memopt.partition.check_halves", lambda f, b, n: graphs.extend([f, b]))
        compiled(x, w)
    checks = [sum("_assert_async" in str(n.target) for n in half.graph.nodes) for half in graphs]
    assert checks == [2, 0]


def test_a_saved_value_that_the_backward_does_not_expect_is_caught() -> None:
    forward, backward, outputs = halves_of(two_layers, square(), square())
    (returned,) = forward.graph.find_nodes(op="output")
    returned.args = (tuple(returned.args[0][:-1]),)
    with pytest.raises(PartitionError, match="bug in memopt"):
        check_halves(forward, backward, outputs)


def test_a_saved_value_of_another_type_is_caught() -> None:
    forward, backward, outputs = halves_of(two_layers, square(), square())
    received = backward.graph.find_nodes(op="placeholder")[0]
    received.meta = {**received.meta, "val": received.meta["val"].float()}
    with pytest.raises(PartitionError, match=re.escape(received.name)):
        check_halves(forward, backward, outputs)


def test_reordering_keeps_every_node_and_never_puts_one_before_its_input() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(operator.neg, (x,))
    second = graph.call_function(operator.pos, (first,))
    third = graph.call_function(operator.inv, (x,))
    graph.output((second, third))
    reorder(graph, [third.name, "no such node", second.name])
    assert [n.name for n in graph.nodes] == ["x", "inv", "neg", "pos", "output"]


def test_the_graph_names_its_values_so_that_no_saved_value_is_a_view() -> None:
    forward, _, outputs = halves_of(lambda x: (x @ x).t().tanh().t().sum(), square())
    (returned,) = forward.graph.find_nodes(op="output")
    saved = [n for n in returned.args[0][outputs:] if n.op == "call_function"]
    assert [n.target for n in saved] == [aten.tanh.default]
