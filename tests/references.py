"""Losses written out in plain PyTorch, and the rule that decides whether numbers are right.

The references take any dtype. In float64 they are the truth; in a lower precision they are what
eager code would have given, and no kernel may be further from the truth than that.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from memopt.kernels.rows import BlockLoss

Tensor = torch.Tensor
Inputs = Sequence[Tensor | None]
Draw = tuple[Callable[..., Tensor], Callable[..., Tensor], Inputs]
LOW_PRECISION = [torch.float32, torch.bfloat16, torch.float16]


def assert_within_reference_error(
    actual: Sequence[Tensor],
    float64: Sequence[Tensor],
    low_precision: Sequence[Tensor],
    *,
    times: float = 1.0,
) -> None:
    """Each result must be as near to the float64 one as plain code in low precision is.

    Distances are norms over the whole tensor. To both is added what writing the exact result down
    in the dtype of ``actual`` may cost, half a unit in the last place: a number that eager hits by
    luck need not be hit.

    Args:
        actual: the results to check.
        float64: the exact ones.
        low_precision: those of plain code.
        times: how many times the distance of plain code is allowed.
    """
    for mine, exact, plain in zip(actual, float64, low_precision, strict=True):
        unit = torch.finfo(mine.dtype).eps / 2 * exact.norm().item()
        error = (mine.double() - exact).norm().item()
        allowed = times * (plain.double() - exact).norm().item() + unit
        assert error <= allowed, f"off by {error:.3e}; eager with rounding is by {allowed:.3e}"


def assert_draws_within_reference_error(
    draw: Callable[[], tuple[list[Tensor], list[Tensor], list[Tensor]]], draws: int = 5
) -> None:
    """The same over several random inputs at once, because eager hits a single number by luck.

    Args:
        draw: makes inputs, and gives the results in the order of the function above.
        draws: how many.
    """
    kinds = zip(*(draw() for _ in range(draws)), strict=True)
    actual, float64, low_precision = (
        [torch.stack(tensors) for tensors in zip(*results, strict=True)] for results in kinds
    )
    assert_within_reference_error(actual, float64, low_precision)


def assert_equal_in_float64(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for mine, plain in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_gradient_is_that_of_the_values(loss: BlockLoss, z: Tensor, *, normaliser: bool) -> None:
    """A row loss's own gradient is what autograd makes of its values.

    Args:
        loss: of as many rows as ``z`` has.
        z: logits.
        normaliser: whether the log-sum-exps are given an upstream gradient too.
    """
    z = z.detach().requires_grad_()
    g, h = torch.randn_like(z[:, 0]), torch.randn_like(z[:, 0]) if normaliser else None
    lse = torch.logsumexp(z, 1)
    total = (loss.values(z, lse) * g).sum() + (0.0 if h is None else (lse * h).sum())
    (expected,) = torch.autograd.grad(total, z)
    with torch.no_grad():
        p = torch.softmax(z, 1)
        loss.gradient_(p, z, lse, g, h)
    torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)


def run(
    function: Callable[..., Tensor],
    inputs: Inputs,
    upstream: Tensor | float = 1.0,
    trained: Sequence[bool] | None = None,
) -> list[Tensor]:
    """The function's result and the gradients of the trained inputs, all by default.

    Args:
        function: of the inputs.
        inputs: copied; None stays None.
        upstream: gradient of the result.
        trained: which inputs require a gradient.
    """
    on = trained or [tensor is not None for tensor in inputs]
    leaves = [
        None if tensor is None else tensor.detach().clone().requires_grad_(flag)
        for tensor, flag in zip(inputs, on, strict=True)
    ]
    result = function(*leaves)
    torch.autograd.backward(result, torch.ones_like(result) * upstream)
    trained_leaves = [t for t in leaves if t is not None and t.requires_grad]
    gradients = [t.grad for t in trained_leaves if t.grad is not None]
    assert len(gradients) == len(trained_leaves), "a gradient is missing"
    return [result.detach(), *gradients]


def assert_near_float64(
    draw: Callable[[], Draw],
    upstream: Tensor | float = 1.0,
    draws: int = 5,
) -> None:
    """Results and gradients are as near to those in float64 as plain code's, of the same dtypes.

    Args:
        draw: makes a function, plain code for it and inputs for both.
        upstream: gradient of the result.
        draws: how many.
    """

    def sides() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        mine, plain, inputs = draw()
        actual, expected = (run(function, inputs, upstream) for function in (mine, plain))
        assert [t.dtype for t in actual] == [t.dtype for t in expected]
        return actual, run(plain, doubles(inputs), upstream), expected

    assert_draws_within_reference_error(sides, draws)


def doubles(inputs: Inputs) -> list[Tensor | None]:
    """The same numbers in float64."""
    return [None if tensor is None else tensor.double() for tensor in inputs]


def logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """As models write it: the product in the model's dtype, what follows in float32 or wider."""
    z = F.linear(x, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def divergence(z: Tensor, teacher_z: Tensor, beta: float) -> Tensor:
    """Of each row, from logits: the formulas of ``memopt.kernels.divergence``."""
    log_p, log_q = z.log_softmax(-1), teacher_z.log_softmax(-1)
    if beta == 0:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    of_teacher = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    of_student = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


def contrastive(x: Tensor, y: Tensor, scale: Tensor, *, both: bool) -> Tensor:
    """As CLIP's training code writes it, where autocast computes cross-entropies in float32."""
    z = scale * (x @ y.t())
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    labels = torch.arange(len(x), device=x.device)
    loss = F.cross_entropy(z, labels)
    return (loss + F.cross_entropy(z.t(), labels)) / 2 if both else loss


def band(q: Tensor, k: Tensor, spans: Sequence[int], sinks: Sequence[int]) -> Tensor:
    """Which keys the queries of each head see, `(Hq, N, M)`: a span, and the first ones."""
    keys, queries = k.shape[2], q.shape[2]
    own = torch.arange(keys - queries, keys)[:, None]
    there = torch.arange(keys)
    seen = [
        (there <= own) & ((own - there < (span or keys)) | (there < first))
        for span, first in zip(spans, sinks, strict=True)
    ]
    return torch.stack(seen).repeat_interleave(q.shape[1] // k.shape[1], 0)


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sinks: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Under a dense mask, with expanded keys: the result, and the log-sum-exps of its scores."""
    seen, group = band(q, k, spans, sinks), q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    z = (scale * q @ k.mT).masked_fill(~seen, -torch.inf)
    return z.softmax(-1) @ v, z.logsumexp(-1)
