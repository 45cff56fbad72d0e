"""Masks are held as bits where a plan says so: the same gradients from an eighth of the bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from bench.zoo.vision import resnet
from memopt.passes.pack_masks import PackMasks
from tests.graphs import assert_same, lowered, problem_of, seeded

SIZE = 96
ON: dict[str, Any] = {PackMasks.name: {"cpu": True}}
Function = Callable[..., Any]


def dropout(x: Tensor, w: Tensor) -> tuple[Tensor]:
    for _ in range(3):
        x = F.dropout(torch.tanh(x @ w), 0.5, training=True)
    return (x.square().sum(),)


def chosen(x: Tensor, w: Tensor) -> tuple[Tensor]:
    for _ in range(3):
        y = x @ w
        x = torch.where(y > 0.3, y, x)
    return (x.square().sum(),)


def masked_by_row(x: Tensor, w: Tensor) -> tuple[Tensor]:
    """The backward reads a view of the mask."""
    kept = x @ w > 0
    y = torch.where(kept.t(), x @ w, 0.0)
    return ((y * torch.where(kept.unsqueeze(0), w, 1.0)).square().sum(),)


def square(rows: int = SIZE, width: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return values.div_(width**0.5).requires_grad_()


@pytest.mark.parametrize("function", [dropout, chosen, masked_by_row])
@pytest.mark.parametrize("budget", [0.9, 0.5, "min"])
def test_gradients_are_those_of_eager(function: Function, budget: float | str) -> None:
    arguments = [square(), square()]
    expected = seeded(function, arguments)
    assert_same(seeded(lowered(function, memory_budget=budget, passes=ON), arguments), expected)


@pytest.mark.parametrize("function", [dropout, chosen])
def test_three_masks_are_offered_as_bits(function: Function) -> None:
    problem = problem_of(function, square(), square(), memory_budget=0.5, passes=ON)
    joint = problem.joint
    assert len(joint.encodings) == 3
    for encoding in joint.encodings:
        (mask,), (bits,) = (joint.storage_of[i] for i in (encoding.source, encoding.encoded))
        assert joint.storages[mask].nbytes == SIZE * SIZE
        assert joint.storages[bits].nbytes == SIZE * SIZE // 8


def floor(function: Function, *args: Tensor, passes: dict[str, Any]) -> tuple[int, list[str]]:
    """The lowest peak, and what is done to storages."""
    torch._dynamo.reset()
    options = {"lowering": "eager", "memory_budget": "min", "passes": passes}
    (graph,) = memopt.explain(function, *args, options=options).graphs
    return graph.predicted_peak_bytes, [row.kind for row in graph.decisions]


def test_a_dropout_that_must_be_held_is_held_as_bits() -> None:
    packed, kinds = floor(dropout, square(), square(), passes=ON)
    plain, others = floor(dropout, square(), square(), passes={})
    assert "pack" in kinds
    assert "pack" not in others
    assert packed <= plain - 7 * SIZE * SIZE // 8


def test_bits_are_not_undone_for_a_doubtful_gain() -> None:
    """A frozen network holds nothing but its masks; this budget has room for them as bytes."""

    def frozen() -> tuple[nn.Module, dict[str, Tensor]]:
        recipe = resnet((1, 1, 1, 1), 16, frozen=True, batch=8, side=64)
        inputs = recipe.inputs(0)
        inputs["images"].requires_grad_()
        return recipe.build().requires_grad_(False), inputs

    def saved_bytes(budget: float | None) -> int:
        options = {"memory_budget": budget}
        (plan,) = memopt.plan_for(frozen, device="h100", options=options).graphs
        return plan.saved_bytes

    assert saved_bytes(0.95) <= saved_bytes(None) // 4


def test_without_a_budget_nothing_is_offered() -> None:
    assert problem_of(dropout, square(), square(), passes=ON).joint.encodings == ()


@pytest.mark.parametrize("width", [96, 97, 99])
def test_any_number_of_entries(width: int) -> None:
    def function(x: Tensor) -> tuple[Tensor]:
        return (F.dropout(x.sin(), 0.3, training=True).cos().sum(),)

    arguments = [square(71, width)]
    expected = seeded(function, arguments)
    assert_same(seeded(lowered(function, memory_budget="min", passes=ON), arguments), expected)


def test_masks_of_channels_last_images() -> None:
    """In the memory order of what they are of."""

    def function(x: Tensor) -> tuple[Tensor]:
        for _ in range(3):
            x = F.dropout(x.sin(), 0.3, training=True).cos()
        return (x.sum(),)

    torch.manual_seed(0)
    x = torch.randn(2, 5, 27, 29, dtype=torch.float64).to(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = seeded(function, [x])
    compiled = lowered(function, memory_budget="min", passes=ON)
    assert_same(seeded(compiled, [x]), expected)
    held = compiled.outcome.chosen.saved
    assert any(encoding.encoded in held for encoding in compiled.problem.joint.encodings)


def test_a_size_that_changes_is_left_as_it_is_and_said() -> None:
    torch._dynamo.reset()
    options: Any = {"lowering": "eager", "memory_budget": "min", "strict": True, "passes": ON}
    compiled = torch.compile(chosen, backend="memopt", dynamic=True, options=options)
    for rows in (70, 90):
        arguments = [square(rows), square()]
        assert_same(seeded(compiled, arguments), seeded(chosen, arguments))
