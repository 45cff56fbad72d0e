"""Gated activations in every spelling become one operator, and what is none stays as it is."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bench  # noqa: F401  # before transformers; it says why
import memopt
from memopt.kernels import gated, gated_packed
from memopt.remarks import RemarkKind
from tests.passes.compiling import argument
from tests.passes.fusing import (
    Fused,
    assert_is_fused,
    assert_is_fused_at_any_length,
    assert_is_left,
)

Gate = Callable[[Tensor, Tensor], Tensor]
WIDTH = 24
is_fused = partial(assert_is_fused, pass_name="fuse_gates")
is_left = partial(assert_is_left, pass_name="fuse_gates")


def draw(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """`x (2, 5, WIDTH)`, of which gate and up are made, and a weight `(2 * WIDTH, WIDTH)`."""
    x, w = torch.randn(2, 5, WIDTH), torch.randn(2 * WIDTH, WIDTH)
    return [t.to(dtype).requires_grad_() for t in (x, w)]


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gelu_by_erf(g: Tensor) -> Tensor:
    return g * 0.5 * (1.0 + torch.erf(g / math.sqrt(2.0)))


def fast_gelu(g: Tensor) -> Tensor:
    return 0.5 * g * (1.0 + torch.tanh(g * 0.7978845608 * (1.0 + 0.044715 * g * g)))


def of_the_library(name: str) -> Callable[[Tensor], Tensor]:
    """What models of transformers take from their table of activations."""
    from transformers.activations import ACT2FN

    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


SPELLINGS: dict[str, tuple[Gate, str]] = {
    "F.silu": (lambda g, u: F.silu(g) * u, "silu"),
    "up first": (lambda g, u: u * F.silu(g), "silu"),
    "x * sigmoid(x)": (lambda g, u: g * torch.sigmoid(g) * u, "silu"),
    "sigmoid(x) * up * x": (lambda g, u: g.sigmoid() * u * g, "silu"),
    "in float32": (lambda g, u: (F.silu(wide(g)) * wide(u)).to(g.dtype), "silu"),
    "the gate in float32": (lambda g, u: (u * F.silu(wide(g))).to(g.dtype), "silu"),
    "F.gelu": (lambda g, u: F.gelu(g) * u, "gelu"),
    "gelu by erf": (lambda g, u: gelu_by_erf(g) * u, "gelu"),
    "F.gelu, tanh": (lambda g, u: F.gelu(g, approximate="tanh") * u, "gelu_tanh"),
    "fast GELU": (lambda g, u: fast_gelu(g) * u, "gelu_tanh"),
    "quick GELU": (lambda g, u: g * torch.sigmoid(1.702 * g) * u, "quick_gelu"),
    "F.relu": (lambda g, u: F.relu(g) * u, "relu"),
    "squared ReLU": (lambda g, u: u * F.relu(g).pow(2), "relu_squared"),
    "sigmoid": (lambda g, u: u * torch.sigmoid(g), "sigmoid"),
}
# Of transformers' table of activations.
NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
}


def two_layers(form: Gate) -> Gate:
    """Gate and up come from a layer each."""
    return lambda x, w: form(F.linear(x, w[:WIDTH]), F.linear(x, w[WIDTH:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", SPELLINGS)
def test_every_spelling_is_one_operator(form: str, dtype: torch.dtype) -> None:
    function, activation = SPELLINGS[form]
    fused = is_fused(two_layers(function), lambda: draw(dtype))
    (call,) = fused.calls(gated.GATED)
    assert argument(call, "activation") == activation


@pytest.mark.parametrize("name", NAMES)
def test_activations_of_the_librarys_table_are_found(name: str) -> None:
    activation = of_the_library(name)
    fused = is_fused(two_layers(lambda g, u: activation(g) * u), draw)
    (call,) = fused.calls(gated.GATED)
    assert argument(call, "activation") == NAMES[name]


def silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


HALVES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "chunk": (lambda z: silu(*z.chunk(2, dim=-1)), False),
    "chunk, the gate last": (lambda z: silu(*reversed(torch.chunk(z, 2, -1))), True),
    "tensor_split": (lambda z: silu(*z.tensor_split(2, dim=2)), False),
    "split by sizes": (lambda z: silu(*torch.split_with_sizes(z, [WIDTH, WIDTH], -1)), False),
    "slices": (lambda z: silu(z[..., :WIDTH], z[..., WIDTH:]), False),
    "slices of all dimensions": (lambda z: silu(z[:, :, WIDTH:], z[:, :, :WIDTH]), True),
    "F.glu": (lambda z: F.glu(z), True),
}


@pytest.mark.parametrize("form", HALVES)
def test_halves_of_one_tensor_are_read_from_it(form: str) -> None:
    function, gate_last = HALVES[form]
    fused = is_fused(lambda x, w: function(F.linear(x, w)), draw)
    (call,) = fused.calls(gated_packed.GATED_PACKED)
    assert argument(call, "gate_last") == gate_last


def test_halves_of_another_dimension_are_two_tensors() -> None:
    fused = is_fused(lambda x, w: silu(*F.linear(x, w).view(2, 5, 2, WIDTH).unbind(2)), draw)
    assert fused.calls(gated.GATED)


def test_sizes_may_change_from_call_to_call() -> None:
    def drawn(length: int) -> list[Tensor]:
        x, w = draw(torch.float64)
        return [x[:, :1].repeat(1, length, 1).detach().requires_grad_(), w]

    assert_is_fused_at_any_length(two_layers(silu), drawn, "fuse_gates")


def test_inference_is_served_too() -> None:
    args = draw()
    fused = Fused(two_layers(silu), "fuse_gates")
    with torch.no_grad():
        torch.testing.assert_close(fused(*args), two_layers(silu)(*args))
    assert fused.rewrites == 1


def test_the_cpu_is_left_alone_unless_it_is_named() -> None:
    report = memopt.explain(
        two_layers(silu), *draw(), options={"lowering": "eager", "passes": {"fuse_gates": True}}
    )
    (graph,) = report.graphs
    assert graph.rewrites["fuse_gates"] == 0
    assert not [r for r in graph.remarks if r.pass_name == "fuse_gates"]


def read_elsewhere(g: Tensor, u: Tensor) -> Tensor:
    activated = F.silu(g)
    return activated * u + activated


def partly_detached(g: Tensor, u: Tensor) -> Tensor:
    with torch.no_grad():
        activated = F.silu(g)
    return activated * u + g


def overwritten(g: Tensor, u: Tensor) -> Tensor:
    h = g.detach() * 1
    activated = F.silu(h)
    h.mul_(2)
    return activated * u + h * g


def in_place(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g * 1).mul_(u)


NEAR: dict[str, tuple[Gate, str]] = {
    "every other entry": (
        lambda g, u: silu(torch.cat([g, u], -1)[..., ::2], torch.cat([u, g], -1)[..., 1::2]),
        "every other entry",
    ),
    "one gate for each row": (lambda g, u: g[..., :1].sigmoid() * u, "gate is 2x5x1"),
    "another activation": (lambda g, u: F.mish(g) * u, "none of the operator's"),
    "made in a loop": (lambda g, u: F.silu(g + 1) * u, "is made in a loop"),
    "read elsewhere": (read_elsewhere, "is also read by"),
    "partly without gradient": (partly_detached, "no gradient passes"),
    "overwritten": (overwritten, "overwrites an input"),
    "a product in float32": (lambda g, u: silu(g.double(), u.double()), "stays torch.float64"),
    "in place": (in_place, ""),
    "no product": (lambda g, u: F.silu(g) + u, ""),
    "no up": (lambda g, u: g * torch.sigmoid(g) + u, ""),
    "another factor": (lambda g, u: g * torch.sigmoid(1.7 * g) + u, "is made in a loop"),
    "another constant": (
        lambda g, u: g * 0.5 * (1 + torch.tanh(0.79 * (g + 0.044715 * g.pow(3)))) + u,
        "",
    ),
    "another root": (lambda g, u: g * 0.5 * (1.0 + torch.erf(g / 1.4)) * u, ""),
    "GLU over rows": (lambda g, u: F.glu(torch.cat([g, u], 1), 1), "the last dimension"),
}


@pytest.mark.parametrize("form", NEAR)
def test_what_looks_like_a_gate_stays_and_says_why(form: str) -> None:
    function, why = NEAR[form]
    is_left(two_layers(function), draw(), why=why)


def test_a_wider_product_is_read_as_it_is() -> None:
    """The halves are of one dtype, and what is returned of another."""
    fused = Fused(lambda g, u: (silu(g.double(), u.double())).float(), "fuse_gates")
    g, u = torch.randn(2, 4, WIDTH)
    torch.testing.assert_close(fused(g, u), silu(g, u))
    assert fused.rewrites == 1
    assert fused.said(RemarkKind.APPLIED)
