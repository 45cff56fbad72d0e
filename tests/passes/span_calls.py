"""Calls of attention that tests of spans compile, and what they are compared with."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memopt
from memopt.attention import SpanPlan
from memopt.attention.rules import Rule
from memopt.passes.sparse_attention import SparseAttention
from tests.span_models import HALF, SHORT, masked, plan_for

BATCH, QUERIES, HEADS, LENGTH, WIDTH = 2, 4, 2, 48, 16
SINKS = 4


class Attend(nn.Module):
    """Attention of what it is given, written in one of several ways."""

    def __init__(self, how: Callable[..., Tensor]) -> None:
        super().__init__()
        self.how = how

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return self.how(q, k, v, *more)


class Outer(nn.Module):
    """A model around it, which gives the call a name."""

    def __init__(self, how: Callable[..., Tensor], layers: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attend(how) for _ in range(layers))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        for layer in self.layers:
            q = q + layer(q, k, v, *more)
        return q


def told(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(QUERIES // HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[2], device=q.device)
    k, v = (x.repeat_interleave(QUERIES // HEADS, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=at[:, None] >= at)


def unlinked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads that are repeated in a way that no one knows."""
    k, v = (x[:, [0, 0, 1, 1]] for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def tensors(n: int = LENGTH, m: int | None = None, dtype: Any = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [
        (BATCH, h, rows, WIDTH)
        for h, rows in zip((QUERIES, HEADS, HEADS), (n, m or n, m or n), strict=True)
    ]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def apart(x: Tensor) -> list[Tensor]:
    return list(torch.split(x, [QUERIES, HEADS, HEADS], dim=1))


class Packed(Outer):
    """Queries, keys and values of one length, which may change."""

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return super().forward(*apart(x), *more)


def changing(given: list[Tensor]) -> Tensor:
    packed = torch.cat([t.detach() for t in given], 1).requires_grad_()
    torch._dynamo.mark_dynamic(packed, 2)
    return packed


def plan(*rules: Rule, layers: int = 1, **given: Any) -> SpanPlan:
    each = rules or (SHORT, HALF)
    return plan_for(
        *((f"layers.{i}", QUERIES, HEADS, WIDTH, each) for i in range(layers)), **given
    )


def reference(rules: tuple[Rule, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = k.shape[2]
    return q + masked(q, k, v, [rule.span(n) for rule in rules], SINKS)


def remarks(model: nn.Module, given: Any, *inputs: Any, **named: Any) -> list[str]:
    torch._dynamo.reset()
    options: Any = {"passes": {"sparse_attention": {"plan": given, "always": True}}}
    report = memopt.explain(
        model, *inputs, options=options | {"lowering": "eager", "strict": True}, **named
    )
    found = [r for graph in report.graphs for r in graph.remarks]
    return [r.text for r in found if r.pass_name == SparseAttention.name]


def assert_same(actual: Tensor, expected: Tensor, given: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    wanted, mine = (torch.autograd.grad((y * weights).sum(), given) for y in (expected, actual))
    for one, other in zip(mine, wanted, strict=True):
        torch.testing.assert_close(one, other)


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def grows(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
    """One token behind those of a cache."""
    k, v = torch.cat([k, new], dim=2), torch.cat([v, new + 1], dim=-2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
