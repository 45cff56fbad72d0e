"""Gradients that are added up in float32 are off by what one rounding per chunk comes to."""

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
def test_roundings_of_all_chunks_are_as_large_as_that_of_the_whole(
    dtype: torch.dtype, chunks: int, rows: int
) -> None:
    """Squares add up: eager rounds the whole product once, a sum its parts and then itself.

    Beyond that there is what the order of a float32 sum of so many rows does.
    """
    draws = [errors(dtype, rows, chunks, seed) for seed in range(3)]
    mine, eager, norm = torch.stack(draws).sum(0).sqrt()
    order = torch.finfo(torch.float32).eps * rows**0.5 * norm
    roundings = torch.tensor([1.0, 2**0.5])  # of the hidden states' gradient, and the weight's
    assert (mine <= roundings * eager + order).all(), f"{mine / eager} of eager's error"
