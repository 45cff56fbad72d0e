"""A mask is made where its value is: the value need not wait for the end of the forward."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import memopt
from memopt.config import Config
from memopt.graph import aten
from memopt.passes.early_masks import EarlyMasks
from memopt.pipeline import PassContext, Pipeline
from tests.graphs import MASKED, OPERATORS, Captured, Program, lowered, programs
from tests.passes.backwards import traced
from tests.references import assert_equal_in_float64
from tests.test_liveness import UNSEEN_BYTES, measured_peak

OFF: dict[str, Any] = {EarlyMasks.name: False}
PACKED: dict[str, Any] = {"pack_masks": {"cpu": True, "least": 64}}
ROWS, WIDTH, LAYERS = 512, 16, 6


def frozen(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    """Its backward needs of each value where it was positive."""
    for weight in weights:
        x = torch.relu(x @ weight)
    return (x.square().sum(),)


def arguments() -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    return [x, *(torch.randn(WIDTH, WIDTH, dtype=torch.float64) for _ in range(LAYERS))]


def planned(function: Any, tensors: list[Tensor], **options: Any) -> Captured:
    captured = lowered(function, **{"memory_budget": "min", "strict": True, **options})
    captured(*tensors)
    return captured


class Frozen(nn.Module):
    """The same as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return frozen(x, *self.parameters())[0]


def lowest(passes: dict[str, Any]) -> int:
    """By Inductor's decompositions, of which masks are a part."""
    options = {"memory_budget": "min", "passes": {**PACKED, **passes}}
    x = torch.zeros(ROWS, WIDTH, requires_grad=True)
    plan = memopt.plan_for(lambda: (Frozen(), {"x": x}), device="cpu", options=options)
    return plan.predicted_peak_bytes


def test_values_do_not_wait_for_their_masks() -> None:
    value = ROWS * WIDTH * 4
    assert lowest({}) <= 3 * value
    assert lowest(OFF) >= lowest({}) + value


def backward(tangents: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Autograd asks for the mask last."""
    y = torch.relu(x @ w)
    z = torch.tanh(y @ w)
    grad = tangents @ w.t()
    return z, torch.where(y.view_as(x) <= 0, 0.0, grad)


def positions(budget: Any) -> list[int]:
    inputs = (torch.randn(8, 8), torch.randn(8, 8), torch.randn(8, 8))
    gm = traced(backward, *inputs)
    config = Config.from_options({"strict": True, "memory_budget": budget})
    Pipeline("test", [EarlyMasks()]).run(gm, PassContext(config))
    for mine, expected in zip(gm(*inputs), backward(*inputs), strict=True):
        assert torch.equal(mine, expected)
    targets = [node.target for node in gm.graph.nodes]
    wanted = (aten.relu.default, aten.le.Scalar, aten.tanh.default)
    return [targets.index(target) for target in wanted]


def test_a_mask_stands_behind_its_value() -> None:
    value, mask, later = positions(0.5)
    assert value < mask < later


def test_without_a_budget_it_stays() -> None:
    value, mask, later = positions(None)
    assert value < later < mask


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_gradients_are_eager_s(lowering: str) -> None:
    torch._dynamo.reset()
    tensors = arguments()
    options: Any = {
        "lowering": lowering,
        "memory_budget": "min",
        "strict": True,
        "passes": PACKED,
    }
    compiled: Any = torch.compile(frozen, backend="memopt", options=options)
    mine, expected = (torch.autograd.grad(f(*tensors)[0], tensors[:1]) for f in (compiled, frozen))
    assert_equal_in_float64(mine, expected)


@settings(max_examples=20)
@given(programs(names=(*OPERATORS, "where"), is_loss=True))
def test_the_predicted_peak_is_the_measured_one(program: Program) -> None:
    tensors = program.arguments()
    captured = planned(program, tensors, passes=PACKED)
    measured = measured_peak(captured, tensors)
    assert 0 <= measured - captured.outcome.chosen.peak_bytes <= UNSEEN_BYTES


@settings(max_examples=20)
@given(programs(names=(*OPERATORS, *MASKED), is_loss=True))
def test_no_lowest_peak_is_higher(program: Program) -> None:
    tensors = program.arguments()
    peaks = [
        planned(program, tensors, passes={**PACKED, **passes}).outcome.chosen.peak_bytes
        for passes in ({}, OFF)
    ]
    assert peaks[0] <= peaks[1]
