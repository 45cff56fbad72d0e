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


def planned_rows(
    budget: str | None, device: str, *, asked: int | None = None, besides: int = 1
) -> int:
    """Rows of a chunk of 2048 after planning, by default 512.

    Args:
        budget: the option ``memory_budget``.
        device: the option ``device``.
        asked: rows that the caller asks for.
        besides: values that are alive while the loss is not.
    """
    model, x, y = made(tokens=2048, classes=500)

    def loss(x: Tensor) -> Tensor:
        rest = x.new_ones(besides).cumsum(0).cumsum(0).sum()
        return linear_cross_entropy(x, model.head.weight, y, chunk_rows=asked) + rest

    captured = lowered(loss, memory_budget=budget, device=device)
    captured(x.requires_grad_())
    (outcome,) = captured.splits[0].outcomes
    assert outcome.limit_bytes is None or outcome.chosen.peak_bytes <= outcome.limit_bytes
    (rows,) = outcome.plan.chunk_rows.values()
    return rows


@pytest.mark.parametrize(
    ("device", "budget", "expected"),
    [
        ("h100", "64MiB", 2048),
        ("h100", "3MiB", 1024),
        ("h100", None, 512),
        ("cpu", "64MiB", 1024),
        ("cpu", None, 512),
    ],
)
def test_room_in_the_budget_makes_fewer_chunks_where_products_gain_from_it(
    device: str, budget: str | None, expected: int
) -> None:
    assert planned_rows(budget, device) == expected


def test_rows_that_were_asked_for_are_kept_where_there_is_room() -> None:
    assert planned_rows("64MiB", "h100", asked=32) == 32


@pytest.mark.parametrize(("besides", "expected"), [(1, 512), (10**7, 1024)])
def test_without_a_budget_chunks_grow_below_the_peak_of_the_rest(
    besides: int, expected: int
) -> None:
    assert planned_rows(None, "cpu", besides=besides) == expected


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
