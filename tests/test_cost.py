"""Seconds of a node: by formula where there is one, and never less for more work."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import fx

from memopt.cost import CostModel, flops
from memopt.device import DEVICES
from memopt.kernels.banded_attention import ATTENTION
from tests.graphs import lowered
from tests.references import band

aten = torch.ops.aten
SLOW = dataclasses.replace(
    DEVICES["cpu"], flops={"float32": 1e9}, bandwidth=1e30, launch_seconds=0.0
)
NARROW = dataclasses.replace(
    DEVICES["cpu"], flops={"float32": 1e30}, bandwidth=1e9, launch_seconds=0.0
)


def node(target: Any, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> fx.Node:
    """A call of ``target`` on inputs of these shapes, traced on the meta device."""
    graph = fx.Graph()
    values = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    inputs = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
    made = graph.call_function(target, tuple(inputs))
    for one, value in zip((*inputs, made), (*values, target(*values)), strict=True):
        one.meta["val"] = value
    return made


def test_a_matrix_product_costs_two_operations_per_term() -> None:
    cost = CostModel(SLOW, fused=True)
    square, twice = node(aten.mm.default, (8, 8), (8, 8)), node(aten.mm.default, (8, 16), (16, 8))
    bound = 2 * 8 * 8 * 8 / 1e9
    assert bound <= cost.seconds(square) <= 2 * bound  # library calls run below the peak
    assert cost.seconds(twice) == pytest.approx(2 * cost.seconds(square))


def test_a_matrix_product_that_is_bound_by_memory_costs_its_bytes() -> None:
    cost = CostModel(NARROW, fused=True)
    moved = 4 * (8 * 4 + 4 * 8 + 8 * 8)
    bound = moved / 1e9
    assert bound <= cost.seconds(node(aten.mm.default, (8, 4), (4, 8))) <= 2 * bound


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("target", [aten.mm.default, aten.tanh.default, aten.sum.default])
def test_more_work_never_costs_less(target: Any, fused: bool) -> None:
    cost = CostModel(DEVICES["cpu"], fused)
    inputs = 2 if target is aten.mm.default else 1
    prices = [cost.seconds(node(target, *[(n, n)] * inputs)) for n in (1, 4, 16, 64, 256)]
    assert prices == sorted(prices)
    assert 0 < prices[0] < prices[-1]


def test_fusion_makes_a_loop_cheaper_and_leaves_a_library_call_as_it_is() -> None:
    fused, plain = CostModel(DEVICES["cpu"], True), CostModel(DEVICES["cpu"], False)
    loop, call = node(aten.add.Tensor, (64, 64), (64, 64)), node(aten.mm.default, (8, 8), (8, 8))
    assert fused.seconds(loop) < plain.seconds(loop)
    assert fused.seconds(call) == plain.seconds(call)


@pytest.mark.parametrize("target", [aten.t.default, aten.detach.default])
def test_a_view_and_an_input_are_free(target: Any) -> None:
    view = node(target, (4, 4))
    cost = CostModel(DEVICES["cpu"], False)
    assert cost.seconds(view) == 0
    assert cost.seconds(view.all_input_nodes[0]) == 0


def test_traffic_is_there_and_back() -> None:
    assert CostModel(NARROW, True).traffic_seconds(10**9) == pytest.approx(2.0)


def test_a_measured_call_takes_time_and_is_measured_once() -> None:
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    product = graph.call_function(aten.mm.default, (a, b))
    for one in (a, b, product):
        one.meta["val"] = torch.empty(64, 64)
    cost = CostModel(DEVICES["cpu"], fused=True, measured=True)
    first = cost.seconds(product)
    assert 0 < first < 1
    assert cost.seconds(product) == first


def test_symbolic_sizes_cost_what_the_traced_sizes_do() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ((x @ w).tanh() @ w).sum()

    prices = []
    for dynamic in (False, True):
        x, w = torch.randn(6, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        captured = lowered(function)
        captured(x, w)
        problem = captured.problem
        symbolic = any(not isinstance(s.expr, int) for s in problem.joint.storages)
        assert symbolic == dynamic
        prices.append((problem.forward_seconds, problem.keep_everything().peak_bytes))
    assert prices[0] == prices[1]


def test_numbers_drawn_one_by_one_on_the_cpu_cost_more_than_exponentials() -> None:
    graph = fx.Graph()
    seed = graph.placeholder("seed")
    seed.meta["val"] = torch.zeros((), dtype=torch.int64)
    target = torch.ops.prims.inductor_random.default
    drawn = graph.call_function(target, ([64, 64], seed, "rand"))
    drawn.meta["val"] = torch.empty(64, 64)
    exponentials = node(aten.exp.default, (64, 64))
    for device, least in (("cpu", 10), ("h100", 2)):
        cost = CostModel(DEVICES[device], fused=True)
        assert cost.seconds(drawn) > least * cost.seconds(exponentials)


@pytest.mark.parametrize("spans", [[3, 0], [1, 5], [100, 2]])
@pytest.mark.parametrize("queries", [1, 4, 9])
def test_banded_attention_costs_the_scores_that_are_seen(spans: list[int], queries: int) -> None:
    q, k, v = (
        torch.empty(2, heads, length, 8, device="meta")
        for heads, length in ((4, queries), (2, 9), (2, 9))
    )
    sinks = [2, 1]
    seen = 2 * int(band(q, k, spans, sinks).sum())
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in "qkv"]
    for one, value in zip(inputs, (q, k, v), strict=True):
        one.meta["val"] = value
    made = graph.call_function(ATTENTION, (*inputs, spans, sinks, 1.0))
    made.meta["val"] = ATTENTION(q, k, v, spans, sinks, 1.0)
    assert flops(made) == 2 * seen * (8 + 8)
