"""Gradients that are added up over chunks are off by what eager's are off by, and by no more."""

import pytest
import torch
import torch.nn.functional as F

from memopt.kernels.linear_cross_entropy import REDUCED

Tensor = torch.Tensor
HIDDEN, CLASSES = 48, 300


def errors(dtype: torch.dtype, rows: int, chunks: int, seed: int) -> Tensor:
    """Squared distances to float64, ours and eager's, of both gradients; and the exact norms."""
    torch.manual_seed(seed)
    x, w = torch.randn(rows, HIDDEN).to(dtype), torch.randn(CLASSES, HIDDEN).mul_(0.2).to(dtype)
    target = torch.randint(CLASSES, (rows,))

    def eager(precision: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(precision, copy=True).requires_grad_() for t in (x, w)]
        z = F.linear(*leaves).to(torch.promote_types(precision, torch.float32))
        return torch.autograd.grad(F.cross_entropy(z, target), leaves)

    options = (None, target, None, -100, 0.0, 1.0, 0.0, -(-rows // chunks), [True, True, False])
    _, *gradients, lacking = REDUCED(x, w, *options, True)
    mine = [(g * lacking).to(dtype) for g in gradients[:2]]
    exact = eager(torch.float64)
    distances = [
        [(g.double() - e).square().sum() for g, e in zip(other, exact, strict=True)]
        for other in (mine, eager(dtype))
    ]
    return torch.tensor([*distances, [e.square().sum() for e in exact]])


@pytest.mark.parametrize(
    ("dtype", "chunks"),
    [(torch.bfloat16, 9), (torch.bfloat16, 13), (torch.float16, 2), (torch.float16, 13)],
    ids=str,
)
@pytest.mark.parametrize("rows", [1024, 3200])
def test_sums_in_float32_add_nothing_to_eagers_error(
    dtype: torch.dtype, chunks: int, rows: int
) -> None:
    """But what the order of a float32 sum of so many rows does to it."""
    draws = [errors(dtype, rows, chunks, seed) for seed in range(3)]
    mine, eager, norm = torch.stack(draws).sum(0).sqrt()
    order = torch.finfo(torch.float32).eps * rows**0.5 * norm
    assert (mine <= eager + order).all(), f"{mine / eager} of eager's error"
