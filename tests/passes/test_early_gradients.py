"""A weight's gradient comes before that of the layer's input, and nothing else changes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx

import memopt
from bench.zoo import MODELS
from memopt.config import Config
from memopt.graph import aten
from memopt.passes.early_gradients import EarlyGradients
from memopt.pipeline import PassContext, Pipeline
from tests.graphs import OPERATORS, Program, lowered, programs
from tests.passes.backwards import traced
from tests.references import assert_equal_in_float64

OFF: dict[str, Any] = {EarlyGradients.name: False}


def chain(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    for weight in weights:
        x = torch.tanh(x @ weight)
    return (x.square().sum(),)


def arguments(layers: int = 3, rows: int = 256, width: int = 16) -> list[Tensor]:
    """Activations are much larger than weights."""
    shapes = [(rows, width), *[(width, width)] * layers]
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]


def backward(tangents: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer's, in autograd's order."""
    dy = torch.tanh(tangents)
    dx = dy @ w.t()
    return dx * x, x.t() @ dy


def after(function: Any, *inputs: Tensor, **options: Any) -> fx.GraphModule:
    gm = traced(function, *inputs)
    config = Config.from_options({"strict": True, "memory_budget": 0.5, **options})
    Pipeline("test", [EarlyGradients()]).run(gm, PassContext(config))
    return gm


def shapes(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    products = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    return [tuple(node.meta["val"].shape) for node in products]


SIZES = (torch.randn(30, 8), torch.randn(30, 12), torch.randn(12, 8))


def test_the_weight_s_gradient_is_first() -> None:
    gm = after(backward, *SIZES)
    assert shapes(gm) == [(12, 8), (30, 12)]
    for mine, expected in zip(gm(*SIZES), backward(*SIZES), strict=True):
        assert torch.equal(mine, expected)


def test_the_order_stays_without_a_budget() -> None:
    assert shapes(after(backward, *SIZES, memory_budget=None)) == [(30, 12), (12, 8)]


def test_a_gradient_that_is_converted_on_its_way_out_is_first_too() -> None:
    def converted(tangents: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        dx, dw = backward(tangents, x, w)
        return dx, (2 * dw).t()

    assert shapes(after(converted, *SIZES)) == [(12, 8), (30, 12)]


def test_a_gradient_that_something_else_is_added_to_stays() -> None:
    def shared(tangents: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        dx, dw = backward(tangents, x, w)
        return dx, dw + dx[:12, :8]

    assert shapes(after(shared, *SIZES)) == [(30, 12), (12, 8)]


def test_two_that_share_a_view_each_come_after_it() -> None:
    def shared(tangents: Tensor, x: Tensor, w: Tensor) -> Any:
        first = torch.tanh(tangents)
        second = torch.sin(first @ w.t() @ w)
        view = x.t()
        other = torch.cos(second)
        return other, view @ second, view @ first

    gm = after(shared, *SIZES)
    for mine, expected in zip(gm(*SIZES), shared(*SIZES), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_gradients_are_eager_s(lowering: str) -> None:
    torch._dynamo.reset()
    options: Any = {"lowering": lowering, "memory_budget": "min", "strict": True}
    compiled: Any = torch.compile(chain, backend="memopt", options=options)
    tensors = arguments()
    mine, expected = (
        torch.autograd.grad(function(*tensors)[0], tensors) for function in (compiled, chain)
    )
    assert_equal_in_float64(mine, expected)


def floor(function: Any, *tensors: Tensor, passes: dict[str, Any]) -> int:
    captured = lowered(function, memory_budget="min", passes=passes)
    captured(*tensors)
    return int(captured.outcome.chosen.peak_bytes)


def test_a_model_s_lowest_peak_is_lower() -> None:
    def make() -> Any:
        recipe = MODELS["bert"].sizes["bench"]
        return recipe.build(), recipe.inputs(0)

    def lowest(passes: dict[str, Any]) -> int:
        options = {"memory_budget": "min", "passes": passes | {"cut_rows": False}}
        return memopt.plan_for(make, device="cpu", options=options).predicted_peak_bytes

    assert lowest({}) < lowest(OFF)


@settings(max_examples=30, deadline=None)
@given(programs(names=OPERATORS, is_loss=True))
def test_no_lowest_peak_is_higher(program: Program) -> None:
    tensors = program.arguments()
    assert floor(program, *tensors, passes={}) <= floor(program, *tensors, passes=OFF)
