"""What a loss would gain or lose, to first order, if an entry of attention were left out.

Without its entry ``A`` the rest of a row is scaled by ``1 / (1 - A)``, so the output changes by
``A / (1 - A) (o - v)``, and the loss by ``A (sum(A g) - g) / (1 - A)`` with ``g = v . do``. Its
magnitude is summed over the blocks of the map, so that nothing of the size of the map is held.

Source: MoA: Fu et al. (2024), arXiv:2406.14909.

Legend: ``B`` sequences, ``Hq`` heads of queries, ``Hk`` of keys, ``G`` of queries for each of
these, ``N`` tokens, ``D`` entries of a head, ``b`` tokens on a side of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_REST = 1e-6  # of 1 - A in float32: where one entry is all, nothing else weighs anything
_CHUNK_BYTES = 2**24  # of the scores of some rows; there are half a dozen such values


def pooled(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, scale: float, block: int) -> Tensor:
    """Influence of causal self-attention's entries, summed in blocks, over sequences and groups.

    Args:
        q: `(B, Hq, N, D)`.
        k: `(B, Hk, N, D)`.
        v: `(B, Hk, N, D)`.
        gradient: of the output, `(B, Hq, N, D)`.
        scale: of the scores.
        block: tokens on a side of a block.

    Returns:
        `(Hk, ceil(N / b), ceil(N / b))`, float64, on the CPU; queries down, keys to the right.
    """
    q, k, v, gradient = (t.detach().float() for t in (q, k, v, gradient))
    heads, n = k.shape[1], k.shape[2]
    blocks = -(-n // block)
    rows = block * max(1, _CHUNK_BYTES // (4 * q.shape[0] * q.shape[1] * n * block))
    summed = torch.zeros(heads, blocks, blocks, dtype=torch.float64)
    for first in range(0, n, rows):
        last = min(first + rows, n)
        query, given = (
            torch.unflatten(t[:, :, first:last], 1, (heads, -1)) for t in (q, gradient)
        )
        entries = _influence(
            query, k[:, :, None, :last], v[:, :, None, :last], given, scale, first
        )
        summed[:, first // block : -(-last // block), : -(-last // block)] = _blocks(
            entries.sum((0, 2)), block
        ).cpu()
    return summed


def _influence(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float, first: int
) -> Tensor:
    """Of the rows from ``first`` on: `(B, Hk, G, rows, keys)`."""
    later = torch.ones(query.shape[3], key.shape[3], dtype=torch.bool, device=key.device)
    scores = (scale * query @ key.mT).masked_fill_(later.triu_(first + 1), -torch.inf)
    weights = scores.softmax(-1)
    slopes = gradient @ value.mT
    mean = (weights * slopes).sum(-1, keepdim=True)
    rest = (1 - weights).clamp_min_(_LEAST_REST)
    return slopes.sub_(mean).mul_(weights).div_(rest).abs_()


def _blocks(entries: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last two dimensions; blocks at the end may be smaller."""
    rows, columns = entries.shape[-2:]
    padded = F.pad(entries, (0, -columns % block, 0, -rows % block)).double()
    columns_apart = torch.unflatten(padded, -1, (-1, block))
    return torch.unflatten(columns_apart, -3, (-1, block)).sum((-1, -3))


def shares(block: int, spans: Tensor, offsets: int) -> Tensor:
    """How much of a block lies outside of a span, by how far the block is off the diagonal.

    Entries are taken to be spread evenly in a block.

    Args:
        block: tokens on a side of it.
        spans: `(R,)`, in tokens.
        offsets: how many; of the block ``d`` below the diagonal, entries are about ``d b`` apart.

    Returns:
        `(R, offsets)`, float64, between 0 and 1.
    """
    apart = torch.arange(1 - block, block)
    counts = block - apart.abs()
    distances = block * torch.arange(offsets)[:, None] + apart
    counts = counts * (distances >= 0)  # what is above the diagonal is not there
    outside = distances >= spans[:, None, None]
    return (outside * counts).sum(-1).double() / counts.sum(-1)
