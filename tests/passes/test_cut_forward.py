"""Graphs without a backward: wide values exist a piece at a time where they do not fit."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from bench.meter import Meter
from memopt.errors import BudgetInfeasibleError

ROWS, NARROW, WIDE = 2048, 32, 256
WHOLE = ROWS * WIDE * 4


class Block(nn.Module):
    """Two feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(NARROW, WIDE) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(WIDE, NARROW) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.gelu(up(F.layer_norm(x, (NARROW,)))))
        return x


def made() -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Block().eval(), torch.randn(4, ROWS // 4, NARROW)


def compiled(block: Block, **options: Any) -> Any:
    return torch.compile(block, backend="memopt", options={"strict": True, **options})


def peak(function: Any, x: Tensor) -> int:
    with torch.no_grad():
        function(x)
        with Meter() as meter:
            result = function(x)
        del result
    return int(meter.peak_bytes)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_budget_in_bytes_is_met(lowering: str) -> None:
    block, x = made()
    budget = WHOLE // 2 + 3 * x.nbytes
    lowered = compiled(block, lowering=lowering, memory_budget=budget)
    assert peak(lowered, x) <= budget < WHOLE
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), block(x))


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_the_lowest_peak_is_of_small_pieces(lowering: str) -> None:
    block, x = made()
    assert peak(compiled(block, lowering=lowering, memory_budget="min"), x) <= WHOLE // 2


@pytest.mark.parametrize("budget", [0.5, 4 * WHOLE])
def test_nothing_is_cut_where_nothing_asks_for_it(budget: Any) -> None:
    block, x = made()
    with torch.no_grad():
        report = memopt.explain(block, x, options={"memory_budget": budget})
    assert "pieces" not in str(report.to_dict())
    assert report.to_dict()["graphs"][0]["predicted_peak_bytes"] >= WHOLE


def test_explain_says_what_is_cut() -> None:
    block, x = made()
    with torch.no_grad():
        report = memopt.explain(block, x, options={"memory_budget": "min"}).to_dict()
    (graph,) = report["graphs"]
    assert "pieces of its rows" in str(graph["remarks"])
    assert graph["predicted_peak_bytes"] <= WHOLE // 2


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_what_no_cut_helps_is_an_error_that_says_so(lowering: str) -> None:
    block, x = made()
    lowered = compiled(block, lowering=lowering, memory_budget=x.nbytes // 2)
    with torch.no_grad(), pytest.raises(Exception, match="no plan fits memory_budget") as raised:
        lowered(x)
    error = getattr(raised.value, "inner_exception", raised.value)
    assert isinstance(error, BudgetInfeasibleError)
    assert error.floor_bytes > error.budget_bytes


def test_a_step_of_training_is_planned_as_before() -> None:
    block, x = made()
    step = compiled(block.train(), memory_budget="min")
    step(x).sum().backward()
    mine = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    block.zero_grad()
    block(x).sum().backward()
    for one, other in zip(mine, block.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-4)


def test_explain_knows_the_peak_of_graphs_that_are_interpreted() -> None:
    block, x = made()
    options = {"lowering": "eager", "memory_budget": "min"}
    with torch.no_grad():
        predicted = memopt.explain(block, x, options=options).predicted_peak_bytes
    measured = peak(compiled(block, **options), x)
    assert abs(predicted - measured) <= measured // 100
