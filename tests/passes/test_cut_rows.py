"""Wide values exist a piece of their rows at a time, where a plan fits no other way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from memopt.graph import aten
from memopt.passes.cut_rows import CutRows
from tests.graphs import Captured, lowered
from tests.references import assert_equal_in_float64
from tests.test_liveness import UNSEEN_BYTES, measured_peak

ROWS, NARROW, WIDE = 512, 16, 64
OFF: dict[str, Any] = {CutRows.name: False}
Function = Callable[..., tuple[Tensor]]


def plain(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        x = x + F.gelu(x @ up) @ down
    return (x.square().sum(),)


def normed(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        x = x + F.gelu(F.layer_norm(x, (NARROW,)) @ up, approximate="tanh") @ down
    return (x.square().mean(),)


def gated(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        gate = F.linear(x, down)
        x = x + F.linear(F.silu(gate) * (x @ up), up)
    return (x.square().sum(),)


def biased(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    for up, down in zip(weights[::2], weights[1::2], strict=True):
        hidden = torch.addmm(up.sum(0), x.flatten(0, -2), up)
        x = x + torch.relu(hidden).mm(down).add(down.sum(0)).view_as(x)
    return (x.square().sum(),)


FORMS = (plain, normed, gated, biased)
SHAPES = ((ROWS, NARROW), (4, ROWS // 4, NARROW), (2, ROWS // 2, NARROW), (1, ROWS, NARROW))


def arguments(shape: tuple[int, ...] = (ROWS, NARROW), layers: int = 3) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [shape, *[(NARROW, WIDE), (WIDE, NARROW)] * layers]
    tensors = [torch.randn(s, dtype=torch.float64) / 4 for s in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def planned(function: Function, tensors: list[Tensor], **options: Any) -> Captured:
    captured = lowered(function, **{"memory_budget": "min", "strict": True, **options})
    captured(*tensors)
    return captured


def wide_rows(captured: Captured) -> set[int]:
    """Rows of the products that are as wide as the weights."""
    joint = captured.problem.joint
    products = (n for n in joint.nodes if n.target in (aten.mm.default, aten.addmm.default))
    shapes = [n.meta["val"].shape for n in products]
    return {shape[0] for shape in shapes if shape[1] == WIDE and shape[0] not in (NARROW, WIDE)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_the_lowest_peak_is_lower_by_wide_values(
    function: Function, shape: tuple[int, ...]
) -> None:
    tensors = arguments(shape)
    cut, whole = (planned(function, tensors, passes=passes) for passes in ({}, OFF))
    assert cut.outcome.cut
    assert not whole.outcome.cut
    assert wide_rows(whole) == {ROWS}
    assert max(wide_rows(cut)) <= ROWS // 2
    lower = whole.outcome.chosen.peak_bytes - cut.outcome.chosen.peak_bytes
    assert lower >= ROWS * WIDE * 8


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_gradients_are_eager_s(function: Function, lowering: str) -> None:
    tensors = arguments(SHAPES[1])
    torch._dynamo.reset()
    options: Any = {"lowering": lowering, "memory_budget": "min", "strict": True}
    compiled: Any = torch.compile(function, backend="memopt", options=options)
    mine, expected = (torch.autograd.grad(f(*tensors)[0], tensors) for f in (compiled, function))
    assert_equal_in_float64(mine, expected)


@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_the_predicted_peak_is_the_measured_one(function: Function) -> None:
    tensors = arguments()
    captured = planned(function, tensors)
    measured = measured_peak(captured, tensors)
    assert 0 <= measured - captured.outcome.chosen.peak_bytes <= UNSEEN_BYTES


def test_nothing_is_cut_where_a_plan_fits() -> None:
    captured = planned(plain, arguments(), memory_budget=0.9)
    assert captured.outcome.fits
    assert not captured.outcome.cut


def test_a_budget_that_fits_no_other_way_is_met() -> None:
    tensors = arguments()
    floor = planned(plain, tensors, passes=OFF).outcome.chosen.peak_bytes
    captured = planned(plain, tensors, memory_budget=floor - ROWS * WIDE * 8)
    assert captured.outcome.fits
    assert captured.outcome.cut
    assert captured.outcome.chosen.peak_bytes <= floor - ROWS * WIDE * 8


def test_no_more_pieces_than_are_asked_for() -> None:
    captured = planned(plain, arguments(), passes={CutRows.name: {"most": 2}})
    assert set(captured.outcome.cut.values()) == {2}


def test_a_plan_is_replayed_with_its_pieces(tmp_path: Path) -> None:
    tensors = arguments()
    first = planned(plain, tensors).outcome
    file = tmp_path / "plan.json"
    file.write_text(first.plan.to_json(), encoding="utf-8")
    again = planned(plain, tensors, plan=str(file)).outcome
    assert again.cut == first.cut
    assert again.chosen.peak_bytes == first.chosen.peak_bytes
    assert again.plan.saved == first.plan.saved


def over_rows(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor]:
    return ((F.gelu((x @ up).softmax(0)) @ down).square().sum(),)


def drawn(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor]:
    return ((F.dropout(x @ up, 0.5) @ down).square().sum(),)


def between_rows(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor]:
    hidden = torch.tanh(x @ up)
    return ((hidden @ hidden.t()).square().sum() + down.sum(),)


@pytest.mark.parametrize("function", [over_rows, drawn, between_rows])
def test_what_needs_other_rows_stays_whole(function: Any) -> None:
    captured = planned(function, arguments(layers=1))
    assert not captured.outcome.cut


def test_rows_that_cannot_be_halved_stay_whole() -> None:
    assert not planned(plain, arguments((ROWS + 1, NARROW))).outcome.cut


def test_explain_says_so() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.down(F.gelu(self.up(x)))
            return (x + hidden).square().sum()

    torch._dynamo.reset()
    options: Any = {"lowering": "eager", "memory_budget": "min"}
    report = memopt.explain(Block(), torch.randn(ROWS, NARROW), options=options)
    assert "pieces of its rows" in str(report.to_dict())
