"""Attention of grouped queries over keys that are never expanded, some rows at a time.

Legend: ``B`` sequences, ``H`` heads of keys, ``G`` heads of queries for each, ``n`` new columns,
``N`` columns of keys, ``D`` and ``E`` entries of a key and of a value. Queries are `(B, H, G, n,
D)`, keys `(B, H, N, D)`, values `(B, H, N, E)`, results `(B, H, G, n, E)`. A column is a place in
the batch's common sequence, padding included.

Sources: a group's heads as rows of one product is FlashInfer's form of decoding: Ye et al.
(2025), arXiv:2501.01005; grouped queries are those of Ainslie et al. (2023), arXiv:2305.13245.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256
"""Queries whose mask exists at a time."""


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attention under a mask.

    Args:
        q: queries.
        k: keys.
        v: values.
        visible: `(B or 1, 1, n, N)`, True where a query may look; None where all is visible.
        scale: of the scores.
    """
    if q.shape[3] == 1:  # a group's heads see the same keys, so they are rows
        rows = F.scaled_dot_product_attention(
            q.flatten(2, 3), k, v, attn_mask=visible, scale=scale
        )
        return rows.unsqueeze(3)
    return _by_group_head(
        q, lambda one: F.scaled_dot_product_attention(one, k, v, attn_mask=visible, scale=scale)
    )


def grouped_queries(q: Tensor, heads: int) -> Tensor:
    """Queries `(B, H * G, n, D)` by head of keys: `(B, H, G, n, D)`."""
    return q.view(len(q), heads, -1, *q.shape[2:])


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of as many queries as keys, each over those up to its own column."""
    return _by_group_head(
        q, lambda one: F.scaled_dot_product_attention(one, k, v, is_causal=True, scale=scale)
    )


def _by_group_head(q: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([attention(q[:, :, head]) for head in range(q.shape[2])], 2)


def row_blocks(n: int) -> Iterator[slice]:
    """The rows of so many queries, `ROWS` at a time."""
    return (slice(first, min(n, first + ROWS)) for first in range(0, n, ROWS))


def over_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    padding: Tensor | None,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention over keys that lie by column, each query over those up to its own.

    A query in a column of padding sees itself, so that its result is a number.

    Args:
        q: queries of ``columns``.
        k: keys of the columns from 0 on.
        v: values of the same.
        columns: `(n,)`.
        padding: `(B, N or more)`, False in columns of padding; None where there are none.
        scale: of the scores.
        window: columns that a query sees, its own included; None for all.
    """
    there = torch.arange(k.shape[2], device=k.device)
    results = []
    for rows in row_blocks(len(columns)):
        own = columns[rows, None]
        visible = there <= own
        if window is not None:
            visible = visible & (there > own - window)
        if padding is not None:
            visible = visible & (padding[:, None, : k.shape[2]] | (there == own))
        results.append(
            attended(q[:, :, :, rows], k, v, visible.view(-1, 1, *visible.shape[-2:]), scale)
        )
    return torch.cat(results, 3)
