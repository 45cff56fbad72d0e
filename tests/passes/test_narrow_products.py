"""Of a product whose parts are read, the parts are computed; and they are what they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import memopt
from memopt.config import Config
from memopt.graph import aten
from memopt.passes.narrow_products import NarrowProducts
from memopt.pipeline import PassContext, Pipeline
from tests.passes.backwards import traced
from tests.references import assert_equal_in_float64

ROWS, COLUMNS = 48, 32  # of the weight that a block is trained of


def written(weight: Tensor, block: Tensor) -> Tensor:
    weight = weight.clone()
    weight[8:20, 4:10] = block
    return weight


def joined(weight: Tensor, block: Tensor) -> Tensor:
    middle = torch.cat((weight[8:20, :4], block, weight[8:20, 10:]), 1)
    return torch.cat((weight[:8], middle, weight[20:]))


def padded(weight: Tensor, block: Tensor) -> Tensor:
    return weight + F.pad(block, (4, COLUMNS - 10, 8, ROWS - 20))


def padded_twice(weight: Tensor, block: Tensor) -> Tensor:
    return padded(weight, block) + F.pad(2 * block, (COLUMNS - 6, 0, 0, ROWS - 12))


def rows(weight: Tensor, block: Tensor) -> Tensor:
    at = torch.arange(3, ROWS, 4)
    return weight.index_copy(0, at, F.pad(block, (0, COLUMNS - 6)))


def put_rows(weight: Tensor, block: Tensor) -> Tensor:
    at = torch.arange(3, ROWS, 4)
    return weight.index_put((at,), F.pad(block, (0, COLUMNS - 6)))


def put_columns(weight: Tensor, block: Tensor) -> Tensor:
    weight = weight.clone()
    weight[:12, torch.tensor([1, 5, 7, 8, 20, 31])] = block
    return weight


FORMS = (written, joined, padded, padded_twice, rows, put_rows, put_columns)
Form = Callable[[Tensor, Tensor], Tensor]


def layer(form: Form) -> tuple[Callable[..., Any], list[Tensor]]:
    """The function ``f(x, first, weight, block)``, and its arguments."""

    def function(x: Tensor, first: Tensor, weight: Tensor, block: Tensor) -> Tensor:
        return F.linear(torch.tanh(x @ first), form(weight, block)).square().sum()

    torch.manual_seed(0)
    wide: dict[str, Any] = {"dtype": torch.float64}
    x, first = torch.randn(64, 24, **wide), torch.randn(24, COLUMNS, **wide)
    weight = torch.randn(ROWS, COLUMNS, **wide)
    block = torch.randn(12, 6, **wide).requires_grad_()
    return function, [x, first, weight, block]


def explained(function: Any, arguments: list[Tensor], **passes: bool) -> Any:
    torch._dynamo.reset()
    options = {"lowering": "eager", "passes": passes, "strict": True}
    (graph,) = memopt.explain(function, *arguments, options=options).graphs
    return graph


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_the_gradient_of_a_block_is_eager_s(form: Form, lowering: str) -> None:
    function, arguments = layer(form)
    torch._dynamo.reset()
    options: Any = {"lowering": lowering, "strict": True}
    compiled: Any = torch.compile(function, backend="memopt", options=options)
    block = arguments[-1]
    mine, expected = (torch.autograd.grad(f(*arguments), block) for f in (compiled, function))
    assert_equal_in_float64(mine, expected)
    assert mine[0].is_contiguous()


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_no_more_of_the_input_is_held_than_meets_the_block(form: Form) -> None:
    function, arguments = layer(form)
    narrow = explained(function, arguments)
    whole = explained(function, arguments, **{NarrowProducts.name: False})
    assert narrow.rewrites[NarrowProducts.name] >= 1
    columns = COLUMNS if form is rows else 12 if form is padded_twice else 6
    assert narrow.saved_bytes <= whole.saved_bytes - 64 * (COLUMNS - columns) * 8


def alone(function: Callable[..., Any], *arguments: Tensor, **options: Any) -> fx.GraphModule:
    """A backward of nothing but ``function``, its first argument a gradient, after the pass."""

    def backward(tangents: Tensor, *others: Tensor) -> Any:
        return function(tangents, *others)

    gm = traced(backward, *arguments)
    passes = {NarrowProducts.name: options} if options else {}
    config = Config.from_options({"strict": True, "passes": passes})
    Pipeline("test", [NarrowProducts()]).run(gm, PassContext(config))
    return gm


def products(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    found = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    return [tuple(node.meta["val"].shape) for node in found]


A, B = torch.randn(20, 12, dtype=torch.float64), torch.randn(12, 16, dtype=torch.float64)
LEFT_ALONE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "its parts are all of it": lambda a, b: torch.split(a @ b, 5),
    "its parts are more": lambda a, b: [(c := a @ b)[:12], c[4:16], c[8:]],
    "it is changed first": lambda a, b: torch.tanh(a @ b)[:4],
    "it is reshaped first": lambda a, b: (a @ b).view(-1)[:4],
    "masks choose": lambda a, b: (a @ b)[torch.arange(20) < 5],
    "pairs of positions choose": lambda a, b: (a @ b)[torch.arange(4), torch.arange(4)],
    "its strides are read": lambda a, b: (a @ b)[:4].as_strided((2, 2), (16, 1)),
    "padding adds as well": lambda a, b: F.pad(a @ b, (-4, 2)),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_what_is_left_alone(why: str) -> None:
    assert products(alone(LEFT_ALONE[why], A, B)) == [(20, 16)]


def test_a_product_that_is_read_whole_is_left_alone() -> None:
    def function(a: Tensor, b: Tensor) -> Any:
        product = a @ b
        return product[:4], product.sum()

    assert products(alone(function, A, B)) == [(20, 16)]


def test_a_product_of_the_forward_is_left_alone() -> None:
    gm = make_fx(lambda a, b: (a @ b)[:4], tracing_mode="fake")(A, B)
    Pipeline("test", [NarrowProducts()]).run(gm, PassContext(Config()))
    assert products(gm) == [(20, 16)]


def test_no_more_parts_than_are_asked_for() -> None:
    def function(a: Tensor, b: Tensor) -> Any:
        product = a @ b
        return [product[i : i + 1] for i in range(0, 8, 2)]

    assert products(alone(function, A, B)) == [(1, 16)] * 4
    assert products(alone(function, A, B, most=3)) == [(20, 16)]


STEPS: tuple[Callable[[Tensor, int, int], Tensor], ...] = (
    lambda x, i, j: x.t(),
    lambda x, i, j: x.transpose(0, -1),
    lambda x, i, j: x.permute(1, 0),
    lambda x, i, j: x.permute(0, 1),
    lambda x, i, j: x.clone(),
    lambda x, i, j: x[min(i, len(x) - 1) :],
    lambda x, i, j: x[:, : j + 1],
    lambda x, i, j: x[:: i + 1],
    lambda x, i, j: x[-(i + 1) :],
    lambda x, i, j: x.index_select(1, torch.arange(x.shape[1])[:: j + 1]),
    lambda x, i, j: x[torch.arange(len(x)).flip(0)[: i + 1]],
    lambda x, i, j: x[:, torch.arange(x.shape[1]) // 2],
    lambda x, i, j: F.pad(x, (-min(j, x.shape[1] - 1), 0, 0, -min(i, len(x) - 1))),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from(STEPS), st.integers(0, 6), st.integers(0, 6)), max_size=5
        ),
        min_size=1,
        max_size=3,
    )
)
def test_any_chain_of_choices_gives_what_it_gave(chains: list[list[Any]]) -> None:
    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        product, results = a @ b, []
        for chain in chains:
            result = product
            for step, i, j in chain:
                result = step(result, i, j)
            results.append(result + 0)
        return results

    gm = alone(function, A, B)
    for mine, expected in zip(gm(A, B), function(A, B), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    read = sum(result.numel() for result in function(A, B))
    assert sum(rows * columns for rows, columns in products(gm)) <= max(read, 20 * 16)
