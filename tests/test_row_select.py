"""Regions are convex, read and write what they say, and leave the graph's meaning alone."""

import itertools
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from memopt.rows.lowering import lower_regions
from memopt.rows.nodes import is_seen_through, operands
from memopt.rows.select import Chooser, ConvexClosure, choose_regions, latest, moved_bytes
from tests.row_functions import (
    Function,
    add_norm_quantise,
    calls,
    lowered,
    quantise_groups,
    read,
    returned,
    swiglu_backward,
    traced,
)
from tests.row_programs import RowFunction, row_functions

NODES = 7
X, Y, W = torch.randn(4, 6, 64), torch.randn(4, 6, 64), torch.randn(64)


@st.composite
def dags(draw: st.DrawFn) -> nx.DiGraph:
    pairs = list(itertools.combinations(range(NODES), 2))
    dag = nx.DiGraph()
    dag.add_nodes_from(range(NODES))
    dag.add_edges_from(draw(st.lists(st.sampled_from(pairs), max_size=14)))
    return dag


def is_convex(members: frozenset[int], dag: nx.DiGraph) -> bool:
    """By definition: every path between members, node by node."""
    pairs = itertools.permutations(members, 2)
    return all(
        members.issuperset(path)
        for source, target in pairs
        for path in nx.all_simple_paths(dag, source, target)
    )


@settings(max_examples=200)
@given(dags(), st.frozensets(st.integers(0, NODES - 1), min_size=1))
def test_the_closure_is_the_smallest_convex_set(dag: nx.DiGraph, members: frozenset[int]) -> None:
    rest = [n for n in range(NODES) if n not in members]
    supersets = (
        members.union(more) for k in range(NODES) for more in itertools.combinations(rest, k)
    )
    assert ConvexClosure(dag)(members) == next(s for s in supersets if is_convex(s, dag))


def quotient(gm: fx.GraphModule) -> nx.DiGraph:
    """The graph with each region as one node."""
    owner: dict[fx.Node, object] = {node: node for node in gm.graph.nodes}
    for number, region in enumerate(choose_regions(gm.graph)):
        assert not any(isinstance(owner[node], int) for node in region.members)
        owner.update(dict.fromkeys(region.members, number))
    nodes = [n for n in gm.graph.nodes if not is_seen_through(n)]
    edges = ((owner[s], owner[n]) for n in nodes for s in operands(n))
    return nx.DiGraph((u, v) for u, v in edges if u != v)


@settings(max_examples=60)
@given(row_functions(most=10), st.integers(0, 2**10 - 1))
def test_regions_of_a_graph_have_no_cycle_and_change_no_number(
    function: RowFunction, calls_between: int
) -> None:
    """Library calls, sorts and transpositions lie between: no region has them."""

    def broken(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = list(function(*inputs))
        for place, result in enumerate(results):
            if result.dtype == torch.float32 and calls_between >> place & 1:
                strange = (result.sort(-1)[0] + result) @ torch.eye(result.shape[-1])
                results[place] = strange.sigmoid() * result + strange
        return tuple(results)

    inputs = function.inputs(torch.float32, (3, 4), 16)
    gm = traced(broken, inputs)
    assert nx.is_directed_acyclic_graph(quotient(gm))
    expected = gm(*inputs)
    count = lower_regions(gm)
    assert count == len(calls(gm))
    for mine, plain in zip(gm(*inputs), expected, strict=True):
        assert torch.equal(mine, plain)


def test_two_regions_that_would_wait_for_each_other_are_not_both_made() -> None:
    """Each is convex by itself: one path leads from the first to the second, one back."""

    def knot(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        rows, columns = x.tanh(), y.reshape(-1, 96).sigmoid()
        back = columns.cumsum(0).reshape(x.shape)
        forth = rows.cumsum(0).reshape(-1, 96)
        return (rows * x + back.exp(), columns * y.reshape(-1, 96) + forth.exp())

    gm = traced(knot, (X, Y))
    assert nx.is_directed_acyclic_graph(quotient(gm))
    lower_regions(gm)
    for mine, plain in zip(gm(X, Y), knot(X, Y), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (add_norm_quantise, (X, Y, W)),
        (swiglu_backward, (X, Y, X.exp())),
        (quantise_groups, (X,)),
    ],
)
def test_one_region_moves_what_goes_in_and_out(
    function: Function, inputs: tuple[Tensor, ...]
) -> None:
    region = lowered(function, inputs)
    results = function(*inputs)
    assert region.ideal_bytes == sum(t.nbytes for t in (*inputs, *results))
    assert region.ideal_bytes == moved_bytes(region.region.members)
    assert region.region.saved_bytes > 0
    for mine, plain in zip(returned(region, region(*read(region, inputs))), results, strict=True):
        assert torch.equal(mine, plain)


def test_a_library_call_is_not_moved() -> None:
    """What can wait for its reader does; what a call reads cannot."""

    def gated(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        gate = (x @ a).sigmoid()
        return (gate * (x @ b)).relu() @ a

    eye = torch.eye(64)
    gm = traced(lambda *args: (gated(*args),), (X, eye, eye))
    (region,) = choose_regions(gm.graph)
    members = [str(n.target) for n in region.members]
    assert members == ["aten.sigmoid.default", "aten.mul.Tensor", "aten.relu.default"]
    last = latest(gm.graph)
    assert len({last[n] for n in region.members}) == 1
    order = [n.target for n in gm.graph.nodes if "mm" in str(n.target)]
    lower_regions(gm)
    assert [n.target for n in gm.graph.nodes if "mm" in str(n.target)] == order


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "scan": lambda x: x.cumsum(-1) * x + 1,
    "reversal": lambda x: x.flip(-1) * x + 1,
    "operator": lambda x: torch.special.i0(x) * x + 1,
    "sine": lambda x: torch.sin(x) * x + 1,
    "other_sum": lambda x: x.sum(0) * x + 1,
    "several_sums": lambda x: x.sum((0, 2), keepdim=True) * x + 1,
    "factor": lambda x: torch.add(x, x, alpha=2) * x + 1,
    "random": lambda x: torch.rand_like(x) * x + 1,
    "integers": lambda x: x * x + 1 + (x.int() // 2),
}


@pytest.mark.parametrize("function", UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_known_makes_the_region_smaller(
    function: Callable[[Tensor], Tensor],
) -> None:
    gm = traced(lambda x: (function(x),), (X,))
    operators = len(gm.graph.nodes) - 2
    torch.manual_seed(1)
    expected = gm(X)
    (region,) = choose_regions(gm.graph)
    assert 2 <= len(region.members) < operators
    assert lower_regions(gm) == 1
    torch.manual_seed(1)
    assert torch.equal(gm(X)[0], expected[0])


def test_float64_is_left_alone() -> None:
    gm = traced(lambda x: (x * x + 1,), (X.double(),))
    before = str(gm.graph)
    assert lower_regions(gm) == 0
    assert str(gm.graph) == before


def test_nothing_moves_past_what_writes_to_its_input() -> None:
    def changing(x: Tensor) -> tuple[Tensor, ...]:
        before = (x * 2).tanh()
        x.add_(1)
        return ((x * 3 + before).sigmoid() * x,)

    gm = traced(changing, (X,))
    assert [len(region.members) for region in choose_regions(gm.graph)] == [2, 4]
    assert lower_regions(gm) == 2
    assert torch.equal(gm(X.clone())[0], changing(X.clone())[0])


@settings(max_examples=30)
@given(row_functions(most=10), st.randoms(use_true_random=False))
def test_what_a_neighbour_saves_is_the_difference_of_prices(
    function: RowFunction, rng: Any
) -> None:
    gm = traced(function, function.inputs(torch.float32, (3, 4), 16))
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and not is_seen_through(n)]
    chooser = Chooser(nodes)
    for _ in range(10):
        node, *members = rng.sample(nodes, rng.randint(2, len(nodes)))
        read = {s for n in members for s in operands(n)} - set(members)
        expected = moved_bytes(members) + moved_bytes([node]) - moved_bytes([*members, node])
        assert chooser.gain(node, set(members), read) == expected


def test_the_backward_of_a_norm_is_one_region_with_the_sum_that_follows() -> None:
    """As autograd writes it: with conversions that name a device, and powers of one."""

    def backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        z = x.float()
        y = (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
        return (torch.autograd.grad(y, x, grad)[0] + grad,)

    inputs = tuple(t.bfloat16() for t in (X, W, Y))
    region = lowered(backward, inputs)
    assert region.ideal_bytes == sum(t.nbytes for t in (*inputs, X.bfloat16()))
