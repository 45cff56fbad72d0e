"""Attention written out in the ways that models have it: functions of queries, keys and values.

Queries, keys and values are `(B, H, N, D)`; of keys and values, fewer heads where a form repeats
them.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Callable[..., Tensor]
LEAST = torch.finfo(torch.float32).min


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def least(like: Tensor) -> float:
    return torch.finfo(like.dtype).min


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1) @ v


def scaled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """OPT and Whisper; nothing is scaled afterwards."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.mT)
    return torch.matmul(F.softmax(scores, -1), v)


def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama, with no dropout."""
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    probabilities = F.softmax(scores, dim=-1, dtype=torch.promote_types(q.dtype, torch.float32))
    probabilities = F.dropout(probabilities.to(q.dtype), p=0.0, training=True)
    return torch.matmul(probabilities, v).transpose(1, 2).contiguous()


def not_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.25
    return F.dropout(scores.softmax(-1), 0.3, training=False) @ v


def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' eager attention: the least number is added."""
    zero = torch.zeros((), dtype=q.dtype)
    mask = torch.where(causal(q.shape[2])[None, None], zero, least(q))
    return torch.softmax(q @ k.transpose(2, 3) * 0.25 + mask, -1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3) * 0.25).masked_fill(~causal(q.shape[2]), -math.inf)
    return scores.softmax(dim=-1) @ v


def filled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).mul_(0.25)
    return scores.masked_fill_(~causal(q.shape[2]), -math.inf).softmax(dim=-1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2 of some years ago: a number of no dimensions."""
    scores = q @ k.transpose(2, 3) / 4.0
    hidden = torch.full([], least(q), dtype=q.dtype)
    return torch.where(causal(q.shape[2]), scores, hidden).softmax(-1) @ v


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2 with its order of scaling turned: ``beta`` is 0."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    rows = q.shape[1]
    empty = torch.empty(q.shape[0], rows, k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=0.25)
    scores = scores.view(2, -1, rows, k.shape[1])
    scores = torch.where(causal(rows), scores, torch.full([], least(q), dtype=q.dtype))
    return torch.bmm(scores.softmax(-1).view(-1, rows, k.shape[1]), v)


def with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bloom's slopes; added by the product itself."""
    heads, rows = q.shape[1], q.shape[2]
    slopes = torch.arange(1, heads + 1, dtype=q.dtype)[:, None, None] / -8
    bias = (slopes * torch.arange(rows).flip(0)).repeat(q.shape[0], rows, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(bias.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.25).softmax(-1), v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BART and OPT: batch and heads in one dimension, but for the mask."""
    batch, heads, rows, width = q.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q * 0.25, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, rows, -1)
    scores = scores + torch.zeros(rows, rows, dtype=q.dtype).masked_fill(~causal(rows), least(q))
    mixed = torch.bmm(F.softmax(scores.view(batch * heads, rows, -1), dim=-1), v)
    return mixed.view(batch, heads, rows, width).transpose(1, 2).reshape(batch, rows, -1)


def by_three_dimensions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).mul(0.25).softmax(2), v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """x-transformers and lucidrains: heads are the second dimension."""
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
    return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(dim=-1), v)


def by_einsum_of_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flax: heads are the third dimension, and keys come first."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    scores = torch.einsum("bkhd,bqhd->bhqk", k, q) / 4
    scores = scores.masked_fill(torch.logical_not(causal(q.shape[1])), LEAST)
    return torch.einsum("bkhd,bhqk->bqhd", v, torch.softmax(scores, -1))


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama: heads of keys are repeated for groups of queries."""

    def repeat(x: Tensor) -> Tensor:
        batch, heads, rows, width = x.shape
        groups = q.shape[1] // heads
        x = x[:, :, None, :, :].expand(batch, heads, groups, rows, width)
        return x.reshape(batch, heads * groups, rows, width)

    return added(q, repeat(k), repeat(v))


def of_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Falcon and PaLM: one head of keys for all queries, without a copy."""
    return plain(q, k[:, :1], v[:, :1])


FORMS: tuple[Form, ...] = (
    plain, scaled_before, upcast, not_dropped, added, filled, filled_in_place, chosen, by_baddbmm,
    with_bias, by_bmm, by_three_dimensions, by_einsum, by_einsum_of_positions, of_one_head,
)  # fmt: skip
