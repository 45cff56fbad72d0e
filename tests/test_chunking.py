"""Chunks get smaller where the budget asks for it, and stay as they are where it does not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from bench.meter import Meter
from memopt.losses import linear_cross_entropy
from tests.graphs import lowered

CLASSES, WIDTH, TOKENS = 6000, 8, 256


class Head(nn.Module):
    """Little but a head: its loss holds the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x), y)


def made() -> tuple[Head, Tensor, Tensor]:
    torch.manual_seed(0)
    return Head(), torch.randn(TOKENS, WIDTH), torch.randint(0, CLASSES, (TOKENS,))


def peak(budget: Any) -> int:
    """Measured peak of one step."""
    model, x, y = made()
    options = {"memory_budget": budget, "lowering": "eager"}
    compiled = torch.compile(model, backend="memopt", options=options)
    compiled(x, y).backward()
    model.zero_grad(set_to_none=True)
    with Meter("cpu") as meter:
        compiled(x, y).backward()
    return meter.peak_bytes


def test_a_budget_below_the_default_chunk_is_met_by_smaller_ones() -> None:
    free = peak(None)
    budget = free * 2 // 3
    assert peak(budget) <= budget
    torch._dynamo.reset()
    assert peak("min") < free // 2


def test_what_no_chunk_reaches_is_infeasible() -> None:
    model, x, y = made()
    gradient_bytes = CLASSES * WIDTH * 4
    with pytest.raises(memopt.BudgetInfeasibleError) as caught:
        memopt.explain(model, x, y, options={"memory_budget": gradient_bytes, "lowering": "eager"})
    assert caught.value.floor_bytes > gradient_bytes


@pytest.mark.parametrize(
    ("device", "budget", "expected"),
    [("h100", "64MiB", TOKENS), ("h100", "4MiB", 128), ("h100", None, 32), ("cpu", "64MiB", 32)],
)
def test_room_in_the_budget_makes_fewer_chunks_where_products_gain_from_it(
    device: str, budget: str | None, expected: int
) -> None:
    model, x, y = made()

    def loss(x: Tensor) -> Tensor:
        return linear_cross_entropy(x, model.head.weight, y, chunk_rows=32)

    captured = lowered(loss, memory_budget=budget, device=device)
    captured(x.requires_grad_())
    (outcome,) = captured.splits[0].outcomes
    assert list(outcome.plan.chunk_rows.values()) == [expected]
    assert outcome.limit_bytes is None or outcome.chosen.peak_bytes <= outcome.limit_bytes
