"""Losses by rows whose upstream gradients are known in advance: gradients in the forward.

Where a loss per row only goes into a sum with constant weights, such as a mask, the weights are
the upstream gradients of the rows up to one factor. Each loss by rows has a form that takes them
and returns, with values by rows, a zero whose gradients are those of the weighted sum. Added to
the sum, which is taken of the values as ever, the zero brings it gradients that exist already.
The logits are made once, where the forms without weights make them again in the backward.

Pays: always, where the weights do not depend on the values.

Legend: ``N`` tokens.

Source: see ``memopt.kernels.linear_cross_entropy``.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memopt.kernels import divergence, forward_gradients, linear_cross_entropy
from memopt.kernels.chunks import run_chunks
from memopt.kernels.head import HALF_UNIT

Three = tuple[Tensor, Tensor, Tensor]
# Values, log-sum-exps and gradients of some rows, or of all; zeros for others.
_Run = Callable[[Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Three]]

_CROSS_ENTROPY = "memopt::linear_cross_entropy_weighted"
_DIVERGENCE = "memopt::linear_divergence_weighted"
_RESULT = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"
torch.library.define(
    _CROSS_ENTROPY,
    f"({linear_cross_entropy.SCHEMA}, Tensor g, Tensor? h) -> ({_RESULT}, Tensor)",
)
torch.library.define(_DIVERGENCE, f"({divergence.SCHEMA}, Tensor g) -> ({_RESULT})")

CROSS_ENTROPY = torch.ops.memopt.linear_cross_entropy_weighted.default
DIVERGENCE = torch.ops.memopt.linear_divergence_weighted.default
VALUES = 5
"""Position of the values among the results; log-sum-exps follow."""


@torch.library.impl(_CROSS_ENTROPY, "default")
def _cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    """A zero, its gradients, the factor that these lack; losses `(N,)` and log-sum-exps.

    ``g`` and ``h`` are the weights `(N,)` of losses and of log-sum-exps.
    """
    *shared, g, h = args
    a = linear_cross_entropy.Arguments(*shared)
    work = linear_cross_entropy.Work.of(a, compact=False)

    def run(
        rows: Tensor | None, g_N: Tensor | None, h_N: Tensor | None
    ) -> tuple[Tensor, Tensor, Three]:
        wanted = [False] * 3 if g_N is None else a.wanted
        return replace(work, rows=rows).run(a.chunk_rows, wanted, g_N, h_N)

    g = torch.where(work.counted_N > 0, g, 0.0).to(a.wide)
    h = None if h is None else h.to(a.wide)
    carrier, values, lse = _weighted(run, g, h, a.x.dtype, visit_some=a.chunk_rows > 0)
    return *carrier, values, lse


@torch.library.impl(_DIVERGENCE, "default")
def _divergence(*args: Any) -> tuple[Tensor, ...]:
    """A zero, its gradients, the factor that these lack, and divergences `(N,)`."""
    *shared, g = args
    a = divergence.Arguments(*shared)
    student = a.student
    counted, _ = divergence.counted_rows(a, student.wide)

    def run(
        rows: Tensor | None, g_N: Tensor | None, h_N: Tensor | None
    ) -> tuple[Tensor, Tensor, Three]:
        wanted = [False] * 3 if g_N is None else a.wanted
        return run_chunks(student, a.loss, a.chunk_rows, wanted, g_N, rows=rows)

    g = torch.where(counted > 0, g, 0.0).to(student.wide)
    carrier, values, _ = _weighted(run, g, None, a.x.dtype, visit_some=True)
    return *carrier, torch.where(counted > 0, values, 0.0)


def _weighted(
    run: _Run, g_N: Tensor, h_N: Tensor | None, dtype: torch.dtype, *, visit_some: bool
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Zero, gradients and lacking factor; values; log-sum-exps.

    On the CPU rows without weight cost one product instead of three.

    Args:
        run: computes some rows, or all.
        g_N: weight of each row's value.
        h_N: weight of each row's log-sum-exp.
        dtype: of the hidden states.
        visit_some: whether ``run`` can leave rows out.
    """
    lacking = g_N.new_ones(())
    if dtype == torch.float16:  # see HALF_UNIT; weights may be of any size
        top = g_N.abs().max() if h_N is None else torch.maximum(g_N.abs(), h_N.abs()).max()
        lacking = torch.where(top > 0, top / HALF_UNIT, 1.0)
        g_N, h_N = g_N / lacking, None if h_N is None else h_N / lacking
    weighty = None
    if visit_some and g_N.device.type == "cpu":
        weighty = g_N != 0 if h_N is None else (g_N != 0) | (h_N != 0)
        weighty = None if bool(weighty.all()) else weighty
    rows = None if weighty is None else weighty.nonzero()[:, 0]
    values, lse, gradients = run(rows, g_N, h_N)
    if weighty is not None:
        others, other_lse, _ = run((~weighty).nonzero()[:, 0], None, None)
        values, lse = values + others, lse + other_lse
    return (torch.zeros_like(lacking), *gradients, lacking), values, lse


def _fake_cross_entropy(*args: Any) -> tuple[Tensor, ...]:
    a = linear_cross_entropy.Arguments(*args[:-2])
    carrier, values = _fake(a.x, a.weight, a.wanted, a.wide)
    return *carrier, values, torch.empty_like(values)


def _fake_divergence(*args: Any) -> tuple[Tensor, ...]:
    a = divergence.Arguments(*args[:-1])
    carrier, values = _fake(a.x, a.weight, a.wanted, a.student.wide)
    return *carrier, values


def _fake(
    x: Tensor, weight: Tensor, wanted: Any, wide: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor]:
    zero = x.new_empty((), dtype=wide)
    gradients = forward_gradients.like(x, weight, wanted)
    return (zero, *gradients, torch.empty_like(zero)), x.new_empty(x.shape[0], dtype=wide)


torch.library.register_fake(_CROSS_ENTROPY, _fake_cross_entropy)
torch.library.register_fake(_DIVERGENCE, _fake_divergence)
forward_gradients.register(_CROSS_ENTROPY, linear_cross_entropy.Arguments._fields.index("wanted"))
forward_gradients.register(_DIVERGENCE, divergence.Arguments._fields.index("wanted"))
