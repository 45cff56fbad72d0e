"""Banded attention in PyTorch code, a tile of scores at a time: `memopt.kernels.banded_attention`.

Tiles hold about ``AREA`` scores whatever the shapes: some queries of all heads of a group, by some
keys. In the forward the queries stay and keys pass by, with a running maximum; in the backward
keys stay and their gradients are added up while queries pass by, so that only the queries'
gradient needs a sum in float32 beside the results. Scores are in units of ``log 2``: PyTorch's
``exp2`` takes a quarter of the time of its ``exp`` on a CPU, and oneDNN half that of the BLAS
library for the products.

Legend: as in `memopt.kernels.banded_attention`; ``T`` heads of keys of all sequences that a tile
is of, ``R`` rows of the tile, ``G`` for each query, ``K`` its keys.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

import torch
from torch import Tensor

from memopt._torch import size_hint
from memopt.kernels.wide import wide, wide_dtype

AREA = 384 * 384
_LEAST_SIDE, _LONGEST_SIDE = 64, 384
# Sizes that are multiples of it are a fifth faster, and are few: oneDNN compiles for each.
_ALIGNED = 64
# What products of other sizes, or smaller ones, gain in oneDNN is no more than what they lose.
_SERVED, _LEAST_PRODUCT = 16, 64
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Heads:
    """Neighbouring heads of keys with one rule, of some sequences.

    Attributes:
        sequences: which of the batch.
        heads: which heads of keys.
        group: ``G``.
        queries: ``N``.
        keys: ``M``.
        width: the larger of ``D`` and ``E``.
        span: how many keys a query sees, its own included, at most ``M``.
        sinks: how many of the first ones besides; 0 where the span is ``M``.
    """

    sequences: slice
    heads: slice
    group: int
    queries: int
    keys: int
    width: int
    span: int
    sinks: int

    @property
    def count(self) -> int:
        """``T``."""
        return _length([self.sequences]) * _length([self.heads])

    @property
    def side(self) -> int:
        """Rows, or keys, that stay: fewer where the span is short, as a tile is no band."""
        return min(_LONGEST_SIDE, max(_LEAST_SIDE, aligned(self.span // 4)))

    @property
    def room(self) -> int:
        """How many heads fit a tile, whose queries' gradient is no larger either."""
        height = min(self.group * self.queries, max(self.group, self.side))
        breadth = min(self.keys, self.span + self.sinks + height, AREA // max(height, self.width))
        largest = max(breadth * max(height, self.width), self.group * self.queries * self.width)
        return max(1, AREA // largest)

    @property
    def first(self) -> int:
        """The position of the first query."""
        return self.keys - self.queries

    def row_chunks(self) -> Iterator[slice]:
        """The queries, some at a time."""
        chunks = cut([slice(0, self.queries)], aligned(self.side // self.group, _SERVED))
        return (chunk for (chunk,) in chunks)

    def keys_of(self, rows: slice) -> Iterator[list[slice]]:
        """What some queries see, a tile's keys at a time: sinks, then the band."""
        stop = self.first + rows.stop
        sinks = slice(0, min(self.sinks, stop))
        # Some more keys, which are hidden, make the sum of both a size that is served well.
        length = sinks.stop + stop - (self.first + rows.start - self.span + 1)
        length = -(-length // _ALIGNED) * _ALIGNED - sinks.stop
        band = slice(max(sinks.stop, stop - length), stop)
        height = self.group * (rows.stop - rows.start)
        return cut([sinks, band], aligned(AREA // max(height, self.width)))

    def key_chunks(self) -> Iterator[slice]:
        """The keys, some at a time, and none both of the sinks and the band."""
        for part in (slice(0, self.sinks), slice(self.sinks, self.keys)):
            yield from (chunk for (chunk,) in cut([part], self.side))

    def rows_of(self, keys: slice) -> Iterator[slice]:
        """The queries that see some keys, a tile's at a time."""
        length = self.keys if keys.stop <= self.sinks else keys.stop - keys.start + self.span - 1
        last = keys.start - self.first + -(-length // _ALIGNED) * _ALIGNED
        start, stop = (min(self.queries, max(0, row)) for row in (keys.start - self.first, last))
        height = AREA // max(keys.stop - keys.start, self.width)
        most = aligned(height // self.group, _SERVED)
        return (chunk for (chunk,) in cut([slice(start, stop)], most))

    def hide(self, z: Tensor, rows: slice, keys: Sequence[slice], value: float) -> None:
        """Give scores `(T, R, K)` that no query sees another value."""
        z, start = z.view(len(z), self.group, -1, z.shape[2]), 0
        height = rows.stop - rows.start
        for part in keys:
            own = self.first + rows.start - part.start  # the column of the first row's own key
            stop = start + part.stop - part.start
            later = start + max(0, own + 1)
            if later < stop:
                hidden = _ones(height, stop - later, z).triu_(own + 1 - (later - start))
                z[..., later:stop].masked_fill_(hidden, value)
            gone = min(stop, start + own - self.span + height)
            if part.stop > self.sinks and gone > start:
                hidden = _ones(height, gone - start, z).tril_(own - self.span)
                z[..., start:gone].masked_fill_(hidden, value)
            start = stop

    def queries_of(self, t: Tensor, rows: slice) -> Tensor:
        """A part of queries or results `(B, Hq, N, ...)`, a view `(b, h, G, C, ...)`."""
        grouped = t.view(len(t), -1, self.group, *t.shape[2:])
        return grouped[self.sequences, self.heads, :, rows]

    def row_tile(self, t: Tensor, rows: slice) -> Tensor:
        """The same in a wide dtype, as rows `(T, R, ...)`."""
        return wide(self.queries_of(t, rows)).flatten(0, 1).flatten(1, 2)

    def key_tile(self, t: Tensor, keys: Sequence[slice]) -> Tensor:
        """Keys or values in a wide dtype: `(T, K, ...)`."""
        parts = [wide(t[self.sequences, self.heads, part]).flatten(0, 1) for part in keys]
        # Contiguous, because oneDNN has no fast product for keys with gaps between them.
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def _ones(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=like.device)


def aligned(size: int, step: int = _ALIGNED) -> int:
    """A size that is no larger and a multiple of the step, where it is as large as that."""
    return max(1, size // step * step or size)


def cut(parts: Sequence[slice], most: int) -> Iterator[list[slice]]:
    """Parts of a sequence in pieces of at most ``most``, about as long as can be even."""
    total = _length(parts)
    step = -(-total // max(1, -(-total // most)))
    step = min(most, -(-step // _ALIGNED) * _ALIGNED)
    piece, room = list[slice](), step
    for part in parts:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            piece.append(slice(start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield piece
                piece, room = [], step
    if piece:
        yield piece


def rules(
    spans: Sequence[int], sinks: Sequence[int], keys: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Spans and sinks of heads, with all keys for the span, and no sinks, where they cover these.

    Args:
        spans: of each head; 0 for all keys.
        sinks: of each head.
        keys: ``M``, all of them.
    """
    pairs = zip(map(size_hint, spans), map(size_hint, sinks), strict=True)
    table = [(keys, 0) if not s or s + first >= keys else (s, first) for s, first in pairs]
    return tuple(s for s, _ in table), tuple(first for _, first in table)


def divide(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[int], sinks: Sequence[int]
) -> Iterator[Heads]:
    """Heads of keys by what they see, as many at a time as a tile has room for.

    Args:
        q: queries, fake or real; sizes of fake ones are those that tracing saw.
        k: keys.
        v: values.
        spans: of each head of keys.
        sinks: of each head of keys.
    """
    batch, all_heads, queries, width = map(size_hint, q.shape)
    heads, keys = map(size_hint, k.shape[1:3])
    if not queries:
        return
    start = 0
    for (span, first), run in groupby(zip(*rules(spans, sinks, keys), strict=True)):
        stop = start + sum(1 for _ in run)
        whole = Heads(
            sequences=slice(0, batch), heads=slice(start, stop), group=all_heads // heads,
            queries=queries, keys=keys, width=max(width, size_hint(v.shape[3])), span=span,
            sinks=first,
        )  # fmt: skip
        across = min(whole.room, stop - start)
        deep = max(1, whole.room // across)
        for head, sequence in product(range(start, stop, across), range(0, batch, deep)):
            yield replace(
                whole,
                sequences=slice(sequence, min(batch, sequence + deep)),
                heads=slice(head, min(stop, head + across)),
            )
        start = stop


def seen_scores(q: Tensor, k: Tensor, spans: Sequence[int], sinks: Sequence[int]) -> int:
    """How many scores all heads of queries of all sequences have, those that are hidden left out.

    Args:
        q: queries, fake or real; sizes of fake ones are those that tracing saw.
        k: keys.
        spans: of each head of keys.
        sinks: of each head of keys.
    """
    batch, heads, queries = map(size_hint, q.shape[:3])
    kv_heads, keys = map(size_hint, k.shape[1:3])

    def sums(rows: int, most: int) -> int:
        """Of the numbers from 1 on, each at most so large."""
        rows = max(0, rows)
        growing = min(rows, most)
        return growing * (growing + 1) // 2 + most * (rows - growing)

    total = 0
    for span, first in zip(*rules(spans, sinks, keys), strict=True):
        for rows, sign in ((keys, 1), (keys - queries, -1)):
            total += sign * (sums(rows, span) + sums(rows - span, first))
    return batch * heads // kv_heads * total


def attend(
    heads: Heads, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Write the attention of some heads, and its log-sum-exp, into the whole results."""
    for rows in heads.row_chunks():
        query = heads.row_tile(q, rows) * (scale * _LOG2_E)
        lowest = torch.finfo(query.dtype).min / 2  # finite: a row may see none of a tile's keys
        top = query.new_full((*query.shape[:2], 1), lowest)
        total, values = torch.zeros_like(top), query.new_zeros(*query.shape[:2], v.shape[3])
        for keys in heads.keys_of(rows):
            z = times(query, heads.key_tile(k, keys).mT)
            heads.hide(z, rows, keys, lowest)
            new = torch.maximum(top, z.amax(-1, keepdim=True))
            z.sub_(new).exp2_()
            again = top.sub_(new).exp2_()
            total.mul_(again).add_(z.sum(-1, keepdim=True))
            values.mul_(again).add_(times(z, heads.key_tile(v, keys)))
            top = new
            del z
        written = heads.queries_of(out, rows)
        written.copy_(values.div_(total).view(written.shape))
        written = heads.queries_of(lse, rows)
        written.copy_(total.log2_().add_(top).div_(_LOG2_E).view(written.shape))


def differentiate(
    heads: Heads, inputs: Sequence[Tensor], scale: float, results: Sequence[Tensor]
) -> None:
    """Write the gradients of some heads into the whole results.

    Args:
        heads: which.
        inputs: the result's gradient, queries, keys, values, the result, and the log-sum-exp.
        scale: of the scores.
        results: gradients of queries, keys and values.
    """
    dout, q, k, v, out, lse = inputs
    everything = slice(0, heads.queries)
    dq = heads.queries_of(results[0], everything)
    is_wide = dq.dtype == wide_dtype(dq)
    sums = dq.zero_() if is_wide else torch.zeros_like(dq, dtype=wide_dtype(dq))
    dots = _dots(heads, dout, out)
    for keys in heads.key_chunks():
        key, value = heads.key_tile(k, [keys]) * (scale * _LOG2_E), heads.key_tile(v, [keys])
        dk, dv = (t.new_zeros(t.mT.shape) for t in (key, value))
        for rows in heads.rows_of(keys):
            query, upstream = heads.row_tile(q, rows), heads.row_tile(dout, rows)
            z = times(query, key.mT)
            z.sub_(heads.row_tile(lse, rows)[..., None] * _LOG2_E).exp2_()
            heads.hide(z, rows, [keys], 0.0)
            dv += times(upstream.mT, z)
            dz = times(upstream, value.mT).sub_(dots[:, :, :, rows].reshape(*z.shape[:2], 1))
            dz.mul_(z)
            dk += times(query.mT, dz)
            part = sums[:, :, :, rows]
            part.add_(times(dz, key).view(part.shape), alpha=1 / _LOG2_E)
            del z, dz
        for result, total in ((results[1], dk.mul_(scale)), (results[2], dv)):
            part = result[heads.sequences, heads.heads, keys]
            part.copy_(total.mT.view(part.shape))
    if not is_wide:
        dq.copy_(sums)


def _dots(heads: Heads, dout: Tensor, out: Tensor) -> Tensor:
    """The sum of each result times its gradient, wide: `(b, h, G, N)`."""
    parts = []
    for rows in heads.row_chunks():
        mine, upstream = (wide(heads.queries_of(t, rows)) for t in (out, dout))
        parts.append((mine * upstream).sum(-1))
    return torch.cat(parts, -1)


def forward_bytes(heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> int:
    """What `attend` allocates at most at a time, in bytes."""
    width, depth = _hint(q, 3), _hint(v, 3)
    copies = max(_copies(k), _copies(v)) + (heads.sinks > 0)
    tiles = {
        (_length([rows]), _length(keys))
        for rows in heads.row_chunks()
        for keys in heads.keys_of(rows)
    }
    own = (
        heads.group * queries * (breadth + width + 2 * depth + 8)
        + copies * breadth * max(width, depth)
        for queries, breadth in tiles
    )
    return heads.count * max(own) * wide_dtype(q).itemsize + 2 * AREA


def backward_bytes(heads: Heads, q: Tensor, k: Tensor, v: Tensor) -> int:
    """What `differentiate` allocates at most at a time, in bytes."""
    width, depth = _hint(q, 3), _hint(v, 3)
    tiles = {
        (_length([rows]), _length([keys]))
        for keys in heads.key_chunks()
        for rows in heads.rows_of(keys)
    }
    is_wide = q.dtype == wide_dtype(q)
    row = (width + depth) * (heads.group > 1 or not is_wide) + max(width, depth) + 4
    key = (3 + _copies(v)) * max(width, depth) + width + depth
    own = max(
        heads.group * queries * (2 * breadth + row) + breadth * key for queries, breadth in tiles
    )
    chunk = max(_length([rows]) for rows in heads.row_chunks())
    sums = heads.group * heads.queries * (2 + width * (not is_wide))
    most = max(own, 3 * heads.group * chunk * depth) + sums
    return heads.count * most * wide_dtype(q).itemsize + 2 * AREA


def _copies(t: Tensor) -> int:
    """Of a tile of keys, where it is not read as it is."""
    return int(t.dtype != wide_dtype(t) or not t.is_contiguous())


def _length(parts: Sequence[slice]) -> int:
    return sum(part.stop - part.start for part in parts)


def _hint(t: Tensor, dimension: int) -> int:
    return size_hint(t.shape[dimension])


def times(a: Tensor, b: Tensor) -> Tensor:
    """The products of some matrices."""
    sizes = (*a.shape[1:], b.shape[2])
    is_served = len(a) == 1 and a.dtype == torch.float32 and a.device.type == "cpu"
    is_served &= min(sizes) >= _LEAST_PRODUCT and not any(size % _SERVED for size in sizes)
    if is_served and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        linear = torch.ops.mkldnn._linear_pointwise.default
        result: Tensor = linear(a[0], b[0].mT, None, "none", [], "")
        return result[None]
    return torch.bmm(a, b)
