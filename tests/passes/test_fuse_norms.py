"""Norms in every spelling become one operator, and what is none stays as it is."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import memopt
from memopt.kernels.norm import MOST_WIDTH, NORM
from memopt.remarks import RemarkKind
from tests.passes.compiling import argument
from tests.passes.fusing import (
    Fused,
    assert_is_fused,
    assert_is_fused_at_any_length,
    assert_is_left,
)
from tests.references import assert_equal_in_float64, run

Norm = Callable[[Tensor, Tensor, Tensor], Tensor]
WIDTH, EPS = 24, 1e-3
is_fused = partial(assert_is_fused, pass_name="fuse_norms")
is_left = partial(assert_is_left, pass_name="fuse_norms")


def draw(dtype: torch.dtype = torch.float32, weight: torch.dtype | None = None) -> list[Tensor]:
    """`x (2, 5, WIDTH)`, a weight and a bias."""
    drawn = [torch.randn(2, 5, WIDTH).to(dtype), *torch.randn(2, WIDTH).to(weight or dtype)]
    return [t.detach().requires_grad_() for t in drawn]


def wide(x: Tensor) -> Tensor:
    """As models write ``x.to(torch.float32)``; float64 stays what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def upcast(x: Tensor) -> Tensor:
    """What Llama's code does in float32."""
    h = wide(x)
    variance = h.pow(2).mean(-1, keepdim=True)
    return h * torch.rsqrt(variance + EPS)


def t5(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x * torch.rsqrt(mean_square(wide(x)) + EPS)
    if w.dtype in (torch.float16, torch.bfloat16):
        h = h.to(w.dtype)
    return w * h


def cohere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = wide(x)
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + EPS)
    return (wide(w) * h).to(x.dtype)


def by_variance(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = wide(x)
    h = (h - h.mean(dim=-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()
    return (h * w + b).to(x.dtype)


SPELLINGS: dict[str, Norm] = {
    "Llama": lambda x, w, b: w * upcast(x).to(x.dtype),
    "T5": t5,
    "Gemma": lambda x, w, b: (upcast(x) * (1.0 + wide(w))).type_as(x),
    "Gemma 3n": lambda x, w, b: (
        wide(x) * torch.pow(mean_square(wide(x)) + EPS, -0.5) * wide(w)
    ).type_as(x),
    "OLMo 2": lambda x, w, b: (w * upcast(x)).to(x.dtype),
    "DeepSeek V4": lambda x, w, b: (
        x * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + EPS).to(x.dtype)
    ),
    "no weight": lambda x, w, b: upcast(x).to(x.dtype),
    "the weight first": lambda x, w, b: x * (w * torch.rsqrt(mean_square(x) + EPS)),
    "one product": lambda x, w, b: w * x * torch.rsqrt(mean_square(x) + EPS),
    "x * x": lambda x, w, b: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w,
    "methods": lambda x, w, b: x.square().mean(2, keepdim=True).add(EPS).rsqrt().mul(x) * w,
    "divided": lambda x, w, b: x / torch.sqrt(mean_square(x) + EPS) * w,
    "one over the root": lambda x, w, b: w * (x * (1.0 / torch.sqrt(EPS + mean_square(x)))),
    "a power": lambda x, w, b: x / (mean_square(x) + EPS) ** 0.5 * w,
    "with bias": lambda x, w, b: x * torch.rsqrt(mean_square(x) + EPS) * w + b,
    "Cohere, centred": cohere,
    "by variance, centred": by_variance,
    "OLMo, centred": lambda x, w, b: F.layer_norm(wide(x), (WIDTH,), None, None, EPS).to(x.dtype),
    "F.layer_norm, centred": lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, EPS),
    "default epsilon, centred": lambda x, w, b: F.layer_norm(x, (WIDTH,), w),
    "Nemotron, centred": lambda x, w, b: F.layer_norm(x, (WIDTH,), w + 1.0, b, EPS),
    "F.rms_norm": lambda x, w, b: F.rms_norm(x, (WIDTH,), w, EPS),
}


def trains_all(form: Norm) -> Norm:
    """All three inputs have a gradient, if only zeros."""
    return lambda x, w, b: form(x, w, b) * (1 + 0 * (x.sum() + w.sum() + b.sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", SPELLINGS)
def test_every_spelling_is_one_operator(form: str, dtype: torch.dtype) -> None:
    fused = is_fused(trains_all(SPELLINGS[form]), lambda: draw(dtype))
    (call,) = fused.calls(NORM)
    assert argument(call, "centred") == form.endswith("centred")
    assert argument(call, "offset") == float(form in ("Gemma", "Nemotron, centred"))
    left = {"mean", "rsqrt", "pow", "square", "var", "layer_norm", "rms_norm"}
    assert not [n for n in fused.graph.nodes if getattr(n.target, "__name__", n.target) in left]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_without_epsilon_has_torchs_own(dtype: torch.dtype) -> None:
    x = draw(dtype)[0].detach() * torch.finfo(dtype).eps ** 0.5
    fused = Fused(lambda x: F.rms_norm(x, (WIDTH,)), "fuse_norms")
    torch.testing.assert_close(fused(x), F.rms_norm(x, (WIDTH,)))
    assert fused.rewrites == 1


def test_modules_of_torch_are_found() -> None:
    rms, layer = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
    fused = Fused(lambda x: rms(x) + layer(x), "fuse_norms")
    x = draw()[0]
    torch.testing.assert_close(fused(x), rms(x) + layer(x))
    assert fused.rewrites == 2


def test_a_wider_weight_widens_the_input() -> None:
    form = trains_all(SPELLINGS["Llama"])
    fused = is_fused(form, lambda: draw(torch.bfloat16, torch.float32))
    (call,) = fused.calls(NORM)
    x: Any = call.args[0]
    assert x.meta["example_value"].dtype == torch.float32


def test_heads_that_are_no_rows_side_by_side_are_normalised_where_they_are() -> None:
    def heads(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = x.view(2, 5, 3, 8).transpose(1, 2)
        h = h * torch.rsqrt(mean_square(h) + EPS) * w[:8]
        return h.transpose(1, 2).reshape(2, 5, WIDTH)

    is_fused(trains_all(heads), draw)


def test_a_view_of_the_result_that_the_operators_does_not_have_keeps_the_norm() -> None:
    def heads(x: Tensor) -> Tensor:
        h = x.view(2, 5, 3, 8).transpose(1, 2)
        h = h * torch.rsqrt(mean_square(h) + EPS)
        return h.transpose(1, 2).view(2, 5, WIDTH) * 2

    is_left(heads, draw()[:1], why="in another order in memory")


def test_sizes_may_change_from_call_to_call() -> None:
    def drawn(length: int) -> list[Tensor]:
        x = torch.randn(2, length, WIDTH, dtype=torch.float64)
        return [x.requires_grad_(), *draw(torch.float64)[1:]]

    function = trains_all(SPELLINGS["Gemma"])
    assert_is_fused_at_any_length(function, drawn, "fuse_norms")


def test_autocasts_float32_results_stay() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.layer_norm(x, (WIDTH,), w, b, EPS) + (w * upcast(x).to(x.dtype))

    args = draw(torch.bfloat16, torch.float32)
    fused = Fused(function, "fuse_norms")
    actual, expected = fused(*args), function(*args)
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)
    assert fused.rewrites == 2


def test_inference_is_served_too() -> None:
    args = draw()
    for mode in (torch.no_grad, torch.inference_mode):
        fused = Fused(SPELLINGS["Llama"], "fuse_norms")
        with mode():
            torch.testing.assert_close(fused(*args), SPELLINGS["Llama"](*args))
        assert fused.rewrites == 1


def test_the_cpu_is_left_alone_unless_it_is_named() -> None:
    report = memopt.explain(
        nn.LayerNorm(WIDTH),
        draw()[0],
        options={"lowering": "eager", "passes": {"fuse_norms": True}},
    )
    (graph,) = report.graphs
    assert graph.rewrites["fuse_norms"] == 0
    assert not [r for r in graph.remarks if r.pass_name == "fuse_norms"]


# The sum that a norm is of.


def blocks(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Two layers' worth of a residual stream."""
    h = x
    for _ in range(2):
        h = h + torch.tanh(w * upcast(h).to(h.dtype))
        h = torch.sin(F.layer_norm(h, (WIDTH,), w, b, EPS)) + h
    return h


def residuals(fused: Fused) -> list[Any]:
    return [call.args[1] for call in fused.calls(NORM)]


def test_the_sum_before_a_norm_is_taken_in_and_returned() -> None:
    fused, inputs = Fused(blocks, "fuse_norms"), draw(torch.float64)
    assert_equal_in_float64(run(fused, inputs), run(blocks, inputs))
    assert fused.rewrites == 4
    first, *others = residuals(fused)
    assert first is None
    assert all(isinstance(residual, fx.Node) for residual in others)
    sums = [n for n in fused.graph.nodes if getattr(n.target, "__name__", n.target) == "add"]
    assert len(sums) == 1  # the last, which no norm follows


def test_the_sum_in_low_precision_is_eagers() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        total = x + x.sin()
        return F.layer_norm(total, (WIDTH,), w, b, EPS) * total

    is_fused(function, lambda: draw(torch.bfloat16))


def test_a_sum_that_nobody_else_reads_is_taken_in() -> None:
    function = trains_all(lambda x, w, b: F.layer_norm(x.sin() + x, (WIDTH,), w, b, EPS))
    (residual,) = residuals(is_fused(function, draw))
    assert isinstance(residual, fx.Node)


def broadcast(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + b, (WIDTH,), w, None, EPS)


def overwritten_sum(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x + x.sin()
    h.mul_(2)
    return F.layer_norm(h, (WIDTH,), w, b, EPS)


def weight_made_later(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x + x.sin()
    return F.layer_norm(h, (WIDTH,), torch.tanh(w), b, EPS)


def without_gradient(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        h = x + x.sin()
    return F.layer_norm(h, (WIDTH,), w, b, EPS)


@pytest.mark.parametrize(
    "function", [broadcast, overwritten_sum, weight_made_later, without_gradient]
)
def test_a_sum_that_cannot_be_made_by_the_operator_stays(function: Norm) -> None:
    assert residuals(is_fused(trains_all(function), draw)) == [None]


# What only looks like one.


def read_elsewhere(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    scale = torch.rsqrt(mean_square(x) + EPS)
    return x * scale * w + scale


def partly_detached(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        scale = torch.rsqrt(mean_square(x) + EPS)
    return x * scale * w


def overwritten(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.detach() * 1
    variance = mean_square(h)
    h.mul_(2)
    return h * torch.rsqrt(variance + EPS) * w


NEAR: dict[str, tuple[Norm, str]] = {
    "another dimension": (
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w,
        "no spelling that is known",
    ),
    "two dimensions": (
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS) * w,
        "no spelling that is known",
    ),
    "the dimension is not kept": (
        lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1) + EPS)[..., None] * w,
        "no spelling that is known",
    ),
    "a sum": (
        lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * w,
        "squares are summed",
    ),
    "epsilon outside": (
        lambda x, w, b: x / (torch.sqrt(mean_square(x)) + EPS) * w,
        "epsilon is added to the root",
    ),
    "cubes": (
        lambda x, w, b: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + EPS) * w,
        "no spelling that is known",
    ),
    "another tensor's": (
        lambda x, w, b: x * torch.rsqrt(mean_square(x.sin()) + EPS) * w,
        "no spelling that is known",
    ),
    "unbiased": (
        lambda x, w, b: (x - x.mean(-1, True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS) * w,
        "no spelling that is known",
    ),
    "a length": (lambda x, w, b: F.normalize(x, dim=-1) * w, "bounds the length"),
    "two dimensions together": (
        lambda x, w, b: F.layer_norm(x, (5, WIDTH)) * w,
        "2 dimensions are normalised together",
    ),
    "too wide": (
        lambda x, w, b: F.layer_norm(x.repeat(1, 1, 400), (400 * WIDTH,)),
        f"the operator takes {MOST_WIDTH}",
    ),
    "read elsewhere": (read_elsewhere, "is also read by"),
    "partly without gradient": (partly_detached, "no gradient passes"),
    "overwritten": (overwritten, "overwrites an input"),
}


@pytest.mark.parametrize("form", NEAR)
def test_what_looks_like_a_norm_stays_and_says_why(form: str) -> None:
    function, why = NEAR[form]
    is_left(trains_all(function), draw(), why=why)


def test_a_weight_by_head_is_no_row() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = wide(x.view(2, 5, 3, 8))
        return (wide(w.view(3, 8)) * (h * torch.rsqrt(mean_square(h) + EPS))).to(x.dtype) + b[:8]

    is_left(trains_all(function), draw(torch.bfloat16), why="scaled in another way")


def test_nothing_is_said_where_nothing_looks_like_a_norm() -> None:
    is_left(lambda x: F.softmax(x, -1).sqrt() + x.exp().rsqrt(), draw()[:1], why="")


def test_inside_a_transform_it_stays() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: F.rms_norm(row, (WIDTH,), None, EPS))(x)

    fused = Fused(function, "fuse_norms")
    x = draw()[0].detach()
    assert torch.equal(fused(x), function(x))
    assert fused.rewrites == 0
    (remark,) = fused.said(RemarkKind.MISSED)
    assert "functorch" in remark.text
