"""Causal attention whose heads look back as far as they need: a span of keys, and the first ones.

The query at position ``p`` sees the key at ``j`` if ``j <= p`` and either ``p - j < span`` or
``j < sinks``, with a span and a number of sinks for each head of keys. Neighbours with the same
rule are one tile's work, and the scores of one tile exist at a time. Keys and values of grouped
queries are never expanded. There may be fewer queries than keys: they are the newest ones, as in
decoding and in prefill by chunks. Batches with padding are not for this operator.

Saved for the backward: queries, keys, values, the result and its log-sum-exp. The backward makes
the scores again, so it is exact: nothing is added up that the forward did not see.

Pays: time in the number of scores that are seen, beside a causal mask's ``M / 2`` for each query,
and no mask in memory. Does not: where spans cover the sequence, on a GPU whose library has a
causal kernel of its own.

Sources: tiles, log-sum-exps and a backward that makes the scores again are FlashAttention's: Dao
(2023), arXiv:2307.08691. Windows are Longformer's: Beltagy et al. (2020), arXiv:2004.05150; the
first keys beside them StreamingLLM's: Xiao et al. (2024), arXiv:2309.17453; a span for each head
MoA's: Fu et al. (2024), arXiv:2406.14909. Grouped queries: Ainslie et al. (2023),
arXiv:2305.13245.

Legend: ``B`` sequences, ``Hq`` heads of queries, ``Hk`` heads of keys, ``G`` heads of queries for
each of these, ``N`` queries, ``M`` keys, ``D`` entries of a key and ``E`` of a value.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from memopt.errors import ConfigError
from memopt.kernels.band_tiles import (
    attend,
    backward_bytes,
    differentiate,
    divide,
    forward_bytes,
)
from memopt.kernels.inputs import no_autocast, same_dtype
from memopt.kernels.serving import launched, serves
from memopt.kernels.spec import Arguments, KernelSpec, Results, drawn
from memopt.kernels.wide import own_bytes, wide_dtype

_TABLE = "SymInt[] spans, SymInt[] sinks, float scale"
torch.library.define(
    "memopt::banded_attention", f"(Tensor q, Tensor k, Tensor v, {_TABLE}) -> (Tensor, Tensor)"
)
torch.library.define(
    "memopt::banded_attention_backward",
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TABLE})"
    " -> (Tensor, Tensor, Tensor)",
)
WIDEST = 256
ATTENTION = torch.ops.memopt.banded_attention.default
ATTENTION_BACKWARD = torch.ops.memopt.banded_attention_backward.default


def _plain(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sinks: Sequence[int], scale: float
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

    Raises:
        ConfigError: shapes, dtypes, spans or sinks are not these.
    """
    check(q, k, v, spans, sinks)
    out, lse = unwritten(q, k, v)
    with no_autocast(q):
        for heads in divide(q, k, v, spans, sinks):
            attend(heads, q, k, v, scale, out, lse)
    return out, lse


def _plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: Sequence[int],
    sinks: Sequence[int],
    scale: float,
) -> Results:
    """Gradients of queries, keys and values.

    Args:
        dout: `(B, Hq, N, E)`, the gradient of the attention.
        q: as in the forward, like what follows.
        k: keys.
        v: values.
        out: the attention.
        lse: its log-sum-exp.
        spans: of each head of keys.
        sinks: of each head of keys.
        scale: of the scores.

    Returns:
        The shapes, dtypes and strides of ``q``, ``k`` and ``v``; those that are no dense block of
        memory keep the order of their strides.

    Raises:
        ConfigError: as in the forward.
    """
    check(q, k, v, spans, sinks)
    results = unwritten_backward(dout, q, k, v)
    if not dout.numel():
        return tuple(gradient.zero_() for gradient in results)
    with no_autocast(q):
        for heads in divide(q, k, v, spans, sinks):
            differentiate(heads, (dout, q, k, v, out, lse), scale, results)
    return results


def check(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sinks: Sequence[int]) -> None:
    """Raise ``ConfigError`` for what is no attention of grouped queries, or has no such table."""
    shapes = f"q is {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)):
        raise ConfigError(f"{shapes}: allowed are (B, Hq, N, D), (B, Hk, M, D) and (B, Hk, M, E)")
    (batch, heads, queries, width), (kv_batch, kv_heads, keys, kv_width) = q.shape, k.shape
    if v.shape[:3] != k.shape[:3] or batch != kv_batch or width != kv_width:
        raise ConfigError(f"{shapes}: allowed are (B, Hq, N, D), (B, Hk, M, D) and (B, Hk, M, E)")
    if max(width, v.shape[3]) > WIDEST:
        raise ConfigError(f"{shapes}: allowed are heads of at most {WIDEST} entries")
    if kv_heads == 0 or heads % kv_heads:
        raise ConfigError(
            f"{heads} heads of queries: allowed is a multiple of {kv_heads}, of keys"
        )
    if queries > keys:
        raise ConfigError(
            f"{queries} queries of {keys} keys: the queries are the newest keys, so there are no "
            "more of them; call scaled_dot_product_attention for other attention"
        )
    same_dtype("q", q, "k", k)
    same_dtype("k", k, "v", v)
    if len(spans) != kv_heads or len(sinks) != kv_heads:
        raise ConfigError(
            f"{len(spans)} spans and {len(sinks)} numbers of sinks: allowed is one for each of "
            f"the {kv_heads} heads of keys"
        )
    for name, values in (("span", spans), ("sinks", sinks)):
        if any(value < 0 for value in values):
            raise ConfigError(
                f"{name} of {min(values)}: allowed is a number of keys from 0 on"
                + (", where 0 is for all of them" if name == "span" else "")
            )


def unwritten(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Results:
    """Results that nobody has written to."""
    batch, heads, n, _width = q.shape
    out = q.new_empty(batch, n, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, n, dtype=wide_dtype(q))


def unwritten_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Results:
    """Gradients that nobody has written to."""
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


torch.library.register_fake("memopt::banded_attention", unwritten)
torch.library.register_fake("memopt::banded_attention_backward", unwritten_backward)
torch.library.register_autograd("memopt::banded_attention", _backward, setup_context=_save)


def _scratch(q: Tensor, k: Tensor, v: Tensor, spans: Any, sinks: Any, scale: float) -> int:
    if serves(q):
        return launched("banded_launches", "forward_bytes")(q, k, v)  # type: ignore[no-any-return]
    return max((forward_bytes(h, q, k, v) for h in divide(q, k, v, spans, sinks)), default=0)


def fits_registers(q: Tensor, v: Tensor) -> bool:
    """Whether the backward has a launch: products of wide heads in float32 spill."""
    return q.dtype != torch.float32 or max(q.shape[3], v.shape[3]) <= WIDEST // 2


def _backward_scratch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spans: Any,
    sinks: Any,
    scale: float,
) -> int:
    if serves(q) and fits_registers(q, v):
        copied = sum(own_bytes(t) for t in (dout, q, k, v, out) if t.stride(3) != 1)
        return copied + 2 * own_bytes(lse)
    return max((backward_bytes(h, q, k, v) for h in divide(q, k, v, spans, sinks)), default=0)


def _samples(dtype: torch.dtype) -> Iterator[Arguments]:
    """Training with two rules, decoding, prefill by chunks with values of another width; odd."""

    def draw(*shape: int) -> Tensor:
        return drawn(*shape, dtype=dtype)

    def by_token(*shape: int) -> Tensor:
        """What a projection gives, by head."""
        return draw(*shape).transpose(1, 2)

    q, k, v = (by_token(1, 160, heads, 64) for heads in (4, 2, 2))
    yield q, k, v, [48, 0], [16, 0], 0.125
    yield draw(4, 8, 1, 64), draw(4, 2, 320, 64), draw(4, 2, 320, 64), [100, 64], [4, 0], 0.125
    yield draw(1, 1, 48, 128), draw(1, 1, 144, 128), draw(1, 1, 144, 64), [40], [33], 0.1
    yield draw(1, 2, 70, 256), draw(1, 2, 70, 256), draw(1, 2, 70, 256), [1, 70], [0, 5], 0.0625
    yield draw(1, 3, 37, 40), draw(1, 1, 53, 40), draw(1, 1, 53, 24), [7], [2], -0.3


def _backward_samples(dtype: torch.dtype) -> Iterator[Arguments]:
    for q, k, v, *table in _samples(dtype):
        out, lse = _plain(q, k, v, *table)
        yield torch.randn(out.shape).to(dtype), q, k, v, out, lse, *table


BANDED_ATTENTION = KernelSpec(
    name="memopt::banded_attention",
    plain=_plain,
    launch=launched("banded_launches", "forward"),
    scratch=_scratch,
    samples=_samples,
    l2_share=8.0,  # keys are read again for every tile of rows
    source="arXiv:2307.08691, arXiv:2309.17453, arXiv:2406.14909",
)
BANDED_ATTENTION_BACKWARD = KernelSpec(
    name="memopt::banded_attention_backward",
    plain=_plain_backward,
    launch=launched("banded_launches", "backward"),
    scratch=_backward_scratch,
    samples=_backward_samples,
    dram_share=1.7,  # two launches read queries, keys, values and the gradient
    l2_share=8.0,
    vector_share=0.1,  # two numbers of each row are read one by one, on AMD by every thread
    source=BANDED_ATTENTION.source,
)
SPECS = (BANDED_ATTENTION, BANDED_ATTENTION_BACKWARD)
for _spec in SPECS:
    _spec.implement()
