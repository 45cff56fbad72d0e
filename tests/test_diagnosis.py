"""An infeasible budget is answered with the floor, the binding step, the holders and a way out."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import memopt
from memopt.errors import BudgetInfeasibleError
from tests.graphs import lowered

BUDGET = 2048  # bytes: less than one 32 x 32 float32 matrix
OPTIONS: dict[str, Any] = {"lowering": "eager", "memory_budget": BUDGET}


def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    hidden = (x @ w).tanh()
    return (hidden @ w).softmax(-1).sum()


def matrices() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(32, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)


def through_compile() -> BaseException:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(function, backend="memopt", options=OPTIONS)(*matrices())
    inner = caught.value.inner_exception
    assert inner is not None
    return inner


def through_optimize() -> BaseException:
    with pytest.raises(Exception, match="no plan fits") as caught:
        memopt.optimize(function, **OPTIONS)(*matrices())
    return getattr(caught.value, "inner_exception", caught.value)


def through_explain() -> BaseException:
    with pytest.raises(BudgetInfeasibleError) as caught:
        memopt.explain(function, *matrices(), options=OPTIONS)
    return caught.value


WAYS = [through_compile, through_optimize, through_explain]


@pytest.mark.parametrize("way", WAYS)
def test_the_error_carries_the_budget_and_the_floor(way: Callable[[], BaseException]) -> None:
    error = way()
    assert isinstance(error, BudgetInfeasibleError)
    assert isinstance(error, ValueError)
    assert error.budget_bytes == BUDGET
    floor = lowered(function, memory_budget="min")
    floor(*matrices())
    assert error.floor_bytes == floor.outcome.chosen.peak_bytes


def test_the_floor_that_is_named_is_a_budget_that_works() -> None:
    error = through_compile()
    assert isinstance(error, BudgetInfeasibleError)
    x, w = matrices()
    torch._dynamo.reset()
    options = {**OPTIONS, "memory_budget": error.floor_bytes}
    loss = torch.compile(function, backend="memopt", options=options)(x, w)
    torch.testing.assert_close(
        torch.autograd.grad(loss, [x, w]), torch.autograd.grad(function(x, w), [x, w])
    )


def test_a_budget_that_a_byte_is_missing_from_is_told_from_the_floor() -> None:
    error = through_compile()
    assert isinstance(error, BudgetInfeasibleError)
    floor = error.floor_bytes
    torch._dynamo.reset()
    with pytest.raises(BudgetInfeasibleError, match=f"{floor - 1:,} B: .* is {floor:,} B"):
        memopt.explain(function, *matrices(), options={**OPTIONS, "memory_budget": floor - 1})


def test_the_budget_that_is_advised_is_a_budget_that_works() -> None:
    advised = re.search(r"raise memory_budget to ([\d.]+ \w+)", str(through_compile()))
    assert advised is not None
    torch._dynamo.reset()
    options = {**OPTIONS, "memory_budget": advised[1]}
    torch.compile(function, backend="memopt", options=options)(*matrices())


def test_the_message_names_the_step_the_line_and_the_holders() -> None:
    text = str(through_compile())
    assert re.search(r"memory_budget = 2\.00 KiB", text)
    assert re.search(
        r"It binds at \w+ at \S*test_diagnosis\.py:\d+, in the (backward|forward)", text
    )
    holders = re.findall(r"^ +([\d.]+ KiB)  (\w+) \((\w+)\) at \S+:(\d+)$", text, re.MULTILINE)
    assert holders
    assert {size for size, *_ in holders} == {"4.00 KiB"}
    first, last = _lines_of(function)
    assert all(first <= int(line) <= last for *_, line in holders)
    assert "Cheapest next action: raise memory_budget to " in text


def _lines_of(f: Any) -> tuple[int, int]:
    lines = [line for *_, line in f.__code__.co_lines() if line]
    return min(lines), max(lines)


@pytest.mark.parametrize("name", ["tanh"])
def test_a_large_output_is_named_as_the_thing_to_drop(name: str) -> None:
    def returns_much(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(torch, name)(x.repeat(64, 1))
        return result

    with pytest.raises(BudgetInfeasibleError, match=f"do not return {name}"):
        memopt.explain(returns_much, matrices()[0], options=OPTIONS)


def test_an_absolute_budget_counts_what_earlier_graphs_of_the_step_hold() -> None:
    class TwoGraphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = (x @ self.w).tanh()
            torch._dynamo.graph_break()
            return (x @ self.w).tanh().sum()

    options = {"lowering": "eager", "memory_budget": "1MiB"}
    report = memopt.explain(TwoGraphs(), torch.randn(64, 64), options=options)
    first, second = report.to_dict()["graphs"][:2]
    held = 2**20 - second["budget_bytes"]
    output_bytes = 64 * 64 * 4
    assert first["budget_bytes"] == 2**20
    assert held == first["saved_bytes"] + output_bytes


def two_graphs(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The first may keep more or less for its backward; the second needs much."""
    for _ in range(4):
        x = (x @ w).tanh()
    torch._dynamo.graph_break()
    return x.repeat(1, 16).softmax(-1).square().sum()


def refusal(budget: Any) -> BudgetInfeasibleError | None:
    """What a step under this budget is told; None where it runs."""
    torch._dynamo.reset()
    options = {"lowering": "eager", "memory_budget": budget}
    x, w = matrices()
    try:
        loss = torch.compile(two_graphs, backend="memopt", options=options)(x, w)
    except torch._dynamo.exc.BackendCompilerFailed as caught:
        if isinstance(caught.inner_exception, BudgetInfeasibleError):
            return caught.inner_exception.with_traceback(None)  # which holds the step's tensors
        raise
    expected = torch.autograd.grad(two_graphs(x, w), [x, w])
    torch.testing.assert_close(torch.autograd.grad(loss, [x, w]), expected)
    return None


def test_what_is_advised_counts_what_earlier_graphs_hold_and_would_hold_with_more() -> None:
    first = refusal(BUDGET)
    assert first is not None
    second = refusal(first.advised)
    assert second is not None
    assert "of it is held by earlier graphs of the step, up to " in str(second)
    assert second.budget_bytes == first.advised
    assert second.floor_bytes > second.budget_bytes
    third = refusal(second.floor_bytes)  # the first graph keeps more with it
    assert third is not None
    assert third.floor_bytes > second.floor_bytes
    assert refusal(second.advised) is None
    assert refusal(third.advised) is None


def test_where_a_fraction_is_refused_a_larger_fraction_is_advised() -> None:
    tried, budget = [0.1], 0.1
    while (error := refusal(budget)) is not None:
        assert error.floor_bytes > error.budget_bytes
        assert isinstance(error.advised, float)
        assert f"raise memory_budget to {error.advised!r}" in str(error)
        budget = error.advised
        tried.append(budget)
    assert tried == sorted({*tried})
    assert 2 <= len(tried) <= 3  # once for each graph


def test_inference_is_not_told_to_accumulate_gradients() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    options = {"memory_budget": 2048}
    with torch.no_grad(), pytest.raises(BudgetInfeasibleError) as caught:
        memopt.explain(model, torch.randn(64, 64), options=options)
    assert "lowest peak" in str(caught.value)
    assert "gradients" not in str(caught.value)
