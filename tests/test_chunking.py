"""Chunks get smaller where the budget asks for it, and stay as they are where it does not."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from bench.meter import Meter
from memopt.kernels import cut_cross_entropy, cut_table
from memopt.losses import linear_cross_entropy
from tests.graphs import lowered
from tests.idle_kernels import IdleKernels

CLASSES, WIDTH, TOKENS = 6000, 8, 256


class Head(nn.Module):
    """Little but a head: its loss holds the peak."""

    def __init__(self, width: int = WIDTH, classes: int = CLASSES) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x), y)


def made(
    tokens: int = TOKENS,
    width: int = WIDTH,
    classes: int = CLASSES,
    dtype: torch.dtype = torch.float32,
) -> tuple[Head, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(tokens, width, dtype=dtype)
    return Head(width, classes).to(dtype), x, torch.randint(0, classes, (tokens,))


def peak(budget: Any, *head: Any) -> int:
    """Measured peak of one step."""
    model, x, y = made(*head)
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


def test_below_the_smallest_chunk_there_are_no_logits_where_the_operator_can_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from memopt.kernels import cut_launches

    monkeypatch.setattr(cut_launches, "kernels", IdleKernels())
    head = 1024, 64, 50_000, torch.bfloat16
    by_chunks = peak("min", *head)
    torch._dynamo.reset()
    run = Mock(side_effect=cut_cross_entropy.run)
    monkeypatch.setattr(cut_cross_entropy, "serves", lambda arguments: True)
    monkeypatch.setattr(cut_cross_entropy, "run", run)
    assert peak("min", *head) < by_chunks
    assert run.called


def test_only_cross_entropies_can_do_without_logits() -> None:
    names = {"", "_rows", "_rows_backward", "_weighted", "_kept"}
    assert set(cut_table()) == {f"memopt.linear_cross_entropy{name}" for name in names}
