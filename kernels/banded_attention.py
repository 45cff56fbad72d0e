"""Causal attention whose heads look back as far as they need: a span of keys, and the first ones.

Legend: ``B`` sequences, ``Hq`` heads of queries, ``Hk`` heads of keys, ``G`` heads of queries for
each of these, ``N`` queries, ``M`` keys, ``D`` entries of a key and ``E`` of a value.
"""

from typing import Any

import torch
from torch import Tensor

from memopt.errors import ConfigError
from memopt.kernels.spec import Arguments, Results
from memopt.kernels.wide import wide, wide_dtype

_TABLE = "SymInt[] spans, SymInt[] sinks, float scale"
torch.library.define(
    "memopt::banded_attention", f"(Tensor q, Tensor k, Tensor v, {_TABLE}) -> (Tensor, Tensor)"
)
torch.library.define(
    "memopt::banded_attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TABLE})"
    " -> (Tensor, Tensor, Tensor)",
)
ATTENTION = torch.ops.memopt.banded_attention.default
ATTENTION_BACKWARD = torch.ops.memopt.banded_attention_backward.default


def _visible(spans: list[int], sinks: list[int], n: int, m: int, device: Any) -> Tensor:
    """Which keys each query sees: `(Hk, N, M)`."""
    own = torch.arange(m - n, m, device=device)[:, None]
    there = torch.arange(m, device=device)
    rows = [
        (there <= own) & ((own - there < (span or m)) | (there < first))
        for span, first in zip(spans, sinks, strict=True)
    ]
    return torch.stack(rows)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, spans: list[int], sinks: list[int], scale: float
) -> Results:
    """The attention.

    Args:
        q: `(B, Hq, N, D)`: the query at ``i`` is that of the key at ``M - N + i``.
        k: `(B, Hk, M, D)`, of the same dtype; head ``h`` is that of queries ``h * G`` to
            ``h * G + G - 1``.
        v: `(B, Hk, M, E)`, of the same dtype.
        spans: for each head of keys how many a query sees, its own included; 0 for all.
        sinks: for each head of keys how many of the first ones a query sees besides.
        scale: of the scores.

    Returns:
        `(B, Hq, N, E)` in the dtype of ``q``, a transposed view of `(B, N, Hq, E)`; and the
        log-sum-exp of each query's scores `(B, Hq, N)`, float32 or wider, which has no gradient.
    """
    check(q, k, v, spans, sinks)
    out, lse = _unwritten(q, k, v)
    grouped = wide(q).unflatten(1, (k.shape[1], -1))
    z = scale * grouped @ wide(k)[:, :, None].mT
    seen = _visible(spans, sinks, q.shape[2], k.shape[2], q.device)[None, :, None]
    z = z.masked_fill(~seen, -torch.inf)
    lse.copy_(z.logsumexp(-1).flatten(1, 2))
    out.copy_((z.softmax(-1) @ wide(v)[:, :, None]).flatten(1, 2))
    return out, lse


def _plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: list[int],
    sinks: list[int],
    scale: float,
) -> Results:
    """Gradients of queries, keys and values."""
    heads = k.shape[1]
    g, o, query = (wide(t).unflatten(1, (heads, -1)) for t in (dout, out, q))
    key, value = wide(k)[:, :, None], wide(v)[:, :, None]
    seen = _visible(spans, sinks, q.shape[2], k.shape[2], q.device)[None, :, None]
    p = (scale * query @ key.mT - lse.unflatten(1, (heads, -1))[..., None]).exp() * seen
    dz = p * (g @ value.mT - (g * o).sum(-1, keepdim=True)) * scale
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    dq.copy_((dz @ key).flatten(1, 2))
    dk.copy_((dz.mT @ query).sum(2))
    dv.copy_((p.mT @ g).sum(2))
    return dq, dk, dv


def check(q: Tensor, k: Tensor, v: Tensor, spans: list[int], sinks: list[int]) -> None:
    """Raise ``ConfigError`` for what is no grouped attention, or has no such table."""
    shapes = f"q is {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)):
        raise ConfigError(
            f"{shapes}: allowed are (B, Hq, N, D), (B, Hk, M, D) and (B, Hk, M, E)"
        )
    if len(spans) != k.shape[1] or len(sinks) != k.shape[1]:
        raise ConfigError(
            f"{len(spans)} spans and {len(sinks)} sinks: allowed is one for each of the "
            f"{k.shape[1]} heads of keys"
        )


def _unwritten(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Results:
    batch, heads, n, _width = q.shape
    out = q.new_empty(batch, n, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, n, dtype=wide_dtype(q))


def _unwritten_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Results:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: Arguments, output: Results) -> None:
    q, k, v, *ctx.table = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 3
    if dout is None:
        return (*nothing, *nothing)
    return (*ATTENTION_BACKWARD(dout, *ctx.saved_tensors, *ctx.table), *nothing)


torch.library.register_fake("memopt::banded_attention", _unwritten)
torch.library.register_fake("memopt::banded_attention_backward", _unwritten_backward)
torch.library.register_autograd("memopt::banded_attention", _backward, setup_context=_save)
torch.library.impl("memopt::banded_attention", "default", _plain)
torch.library.impl("memopt::banded_attention_backward", "default", _plain_backward)
