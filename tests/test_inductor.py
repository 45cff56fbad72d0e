"""Through Inductor: the bound holds on emitted code, eager's numbers, caches still work."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import memopt
from bench.meter import Meter
from bench.zoo import MODELS
from memopt import lowering
from memopt._torch import dynamo_counters
from tests.training import assert_trains_within_reference_error, train_step

NAMES = ("lm_dropout", "unet")


def peak_of(run: Any, model: nn.Module, inputs: dict[str, Any]) -> int:
    train_step(run, model, inputs)
    model.zero_grad(set_to_none=True)
    with Meter("cpu") as meter:
        train_step(run, model, inputs)
    return meter.peak_bytes


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_holds_and_the_numbers_are_as_near_to_float64_as_stock_inductors(
    name: str,
) -> None:
    """Eager is no reference: it draws other masks, and adds up in another order.

    The gradient of a U-Net's last norm is an order of magnitude nearer to float64 in eager than in
    stock Inductor, and nine times further off in eager itself with tensors laid out channels last.
    """
    model, tensors = MODELS[name].make("tiny")
    inputs: dict[str, Any] = dict(tensors)
    exact = copy.deepcopy(model).double()
    stock = torch.compile(model)
    stock_peak = peak_of(stock, model, inputs)
    unbounded = torch.compile(model, backend="memopt")
    assert peak_of(unbounded, model, inputs) <= stock_peak
    floor = memopt.explain(model, options={"memory_budget": "min"}, **inputs).graphs[0]
    assert floor.certified
    budget = (floor.predicted_peak_bytes + stock_peak) // 2
    bounded = torch.compile(model, backend="memopt", options={"memory_budget": budget})
    assert peak_of(bounded, model, inputs) <= budget
    truth = torch.compile(exact)
    assert_trains_within_reference_error(
        (bounded, model), (truth, exact), (stock, model), [inputs]
    )


def test_channels_that_are_convolved_each_for_itself_are_not_copied() -> None:
    model, tensors = MODELS["convnext"].make("tiny")
    inputs: dict[str, Any] = dict(tensors)
    stock_peak = peak_of(torch.compile(model), model, inputs)
    assert peak_of(torch.compile(model, backend="memopt"), model, inputs) < stock_peak


def test_the_report_foretells_the_measured_peak() -> None:
    model, tensors = MODELS["lm8"].make("tiny")
    inputs: dict[str, Any] = dict(tensors)
    options: dict[str, Any] = {"memory_budget": "min"}
    (graph,) = memopt.explain(model, options=options, **inputs).graphs
    measured = peak_of(torch.compile(model, backend="memopt", options=options), model, inputs)
    assert abs(graph.predicted_peak_bytes - measured) <= max(measured // 100, 2**15)


def test_groups_may_be_a_batch_that_changes() -> None:
    """A filter for each image, as in StyleGAN2: the number of groups is no number in the graph."""

    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 2, 3, 3))

        def forward(self, x: Tensor, style: Tensor) -> Tensor:
            batch = len(x)
            weight = (self.weight * style[:, None, :, None, None]).flatten(0, 1)
            images = x.reshape(1, -1, *x.shape[2:])
            y = F.conv2d(images, weight, padding=1, groups=batch)
            return y.reshape(batch, -1, *x.shape[2:])

    found = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        (node,) = gm.graph.find_nodes(op="call_function", target=F.conv2d)
        found.append((type(node.kwargs["groups"]), lowering._is_depthwise(gm)))
        return gm

    torch.compile(Modulated(), backend=backend, dynamic=True)(
        torch.randn(2, 2, 6, 5), torch.randn(2, 2)
    )
    assert found == [(fx.Node, False)]


def test_a_second_compilation_comes_from_the_cache_and_other_options_do_not() -> None:
    model, tensors = MODELS["lm8"].make("tiny")
    inputs: dict[str, Any] = dict(tensors)

    def hits(budget: Any) -> int:
        torch._dynamo.reset()
        before = dynamo_counters["aot_autograd"]["autograd_cache_hit"]
        train_step(
            torch.compile(model, backend="memopt", options={"memory_budget": budget}),
            model,
            inputs,
        )
        return int(dynamo_counters["aot_autograd"]["autograd_cache_hit"] - before)

    first = hits(0.61)
    assert hits(0.61) >= first + 1
    assert hits(0.62) == first


def test_an_infeasible_budget_says_so_before_anything_runs() -> None:
    model, tensors = MODELS["lm8"].make("tiny")
    inputs: dict[str, Any] = dict(tensors)
    compiled = torch.compile(model, backend="memopt", options={"memory_budget": 2048})
    with pytest.raises(Exception, match="no plan fits memory_budget") as caught:
        compiled(**inputs)
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, memopt.BudgetInfeasibleError)
    assert inner.floor_bytes > inner.budget_bytes
    assert all(p.grad is None for p in model.parameters())
