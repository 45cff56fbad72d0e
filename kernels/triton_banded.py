"""Triton kernels of the banded attention; `banded_launches` launches them.

A tile's rows are queries of all heads of a group: row ``r`` is query ``r // G`` of the group's
head ``r % G``, so that rows of a tile see the same keys, which are read once for all of them and
never expanded. The forward goes over the sinks, then over the band; where there are few rows, as
in decoding, the keys are split among programs, and a second launch puts their results together by
their log-sum-exps. The backward has a launch for the gradient of queries, which goes over keys,
and one for those of keys and values, which goes over the rows that see them. No program writes
where another one does and nothing is atomic, so results do not depend on the order of programs.

Offsets of rows are 64-bit. The forward has scores in units of ``log 2``; the backward takes the
log-sum-exp off before it changes to them, which costs a product and saves a rounding.

Source: keys split among programs are Flash-Decoding's: Dao, Haziza, Massa, Sizov (2023),
https://crfm.stanford.edu/2023/10/12/flashdecoding.html.

Legend: as in `memopt.kernels.banded_attention`. Those in upper case are known at compile time: a
tile has ``ROWS`` rows and ``KEYS`` keys, of ``DIM`` and ``VDIM`` entries, which are ``D`` and
``E`` rounded up to powers of two.
"""

import triton
import triton.language as tl

_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _places(start, inside, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of rows ``SIZE`` wide that start somewhere, and which of them are to be touched."""
    column = tl.arange(0, SIZE)
    at = start[:, None] + column[None, :]
    seen = inside[:, None]
    if WIDTH < SIZE:
        seen = seen & (column < WIDTH)[None, :]
    return at, seen


@triton.jit
def _read(ptr, start, inside, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a matrix, and 0 where there are none."""
    at, seen = _places(start, inside, SIZE, WIDTH)
    return tl.load(ptr + at, mask=seen, other=0.0)


@triton.jit
def _write(ptr, start, inside, values, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a matrix, rounded to what they are kept in."""
    at, seen = _places(start, inside, SIZE, WIDTH)
    tl.store(ptr + at, values.to(ptr.dtype.element_ty), mask=seen)


@triton.jit
def _rule(spans, sinks, head, HEADS: tl.constexpr):
    """Span and sinks of a head of keys; the tables are arguments, so nothing is uploaded."""
    span, first = spans[0], sinks[0]
    for other in tl.static_range(1, HEADS):
        span = tl.where(head == other, spans[other], span)
        first = tl.where(head == other, sinks[other], first)
    return span, first


@triton.jit
def _keys_seen(row, stop_row, N, M, GROUP: tl.constexpr, span, first):
    """Of the rows from one to before another: the sinks' end, the band's start, and its end."""
    low = M - N + row // GROUP
    high = tl.minimum(M, M - N + (stop_row - 1) // GROUP + 1)
    sink_stop = tl.minimum(first, high)
    return sink_stop, tl.maximum(sink_stop, low - span + 1), high


@triton.jit
def _tile_of_keys(turn, sink_turns, sink_stop, band, high, KEYS: tl.constexpr):
    """The keys of a turn, before which key they end, and whether they are sinks."""
    is_sink = turn < sink_turns
    start = tl.where(is_sink, turn * KEYS, band + (turn - sink_turns) * KEYS)
    return start + tl.arange(0, KEYS), tl.where(is_sink, sink_stop, high), is_sink


@triton.jit
def _seen(position, key, limit, span, is_sink):
    """Which keys queries see, by position, of the shape that the two expand to."""
    behind = position - key
    return (behind >= 0) & (key < limit) & ((behind < span) | is_sink)


@triton.jit(do_not_specialize=["spans", "sinks"])
def banded_forward(
    q, k, v, out, lse, spans, sinks, N, M, factor,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    o_split, o_batch, o_head, o_row, l_split, l_batch, l_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr,
    E: tl.constexpr, DIM: tl.constexpr, VDIM: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of some rows to one split's share of their keys; ``out`` and ``lse`` by split.

    Programs are of tiles of rows, heads of keys, and splits of sequences. ``factor`` is the scale
    over ``log 2``.
    """
    head = tl.program_id(1)
    sequence = (tl.program_id(2) // SPLITS).to(tl.int64)
    split = tl.program_id(2) % SPLITS
    start_row = tl.program_id(0) * ROWS
    row = start_row + tl.arange(0, ROWS)
    known = row < N * GROUP
    own = (head * GROUP + row % GROUP).to(tl.int64)
    index = (row // GROUP).to(tl.int64)
    position = M - N + row // GROUP
    query = _read(q, sequence * q_batch + own * q_head + index * q_row, known, DIM, D)
    span, first = _rule(spans, sinks, head, HEADS)
    sink_stop, band, high = _keys_seen(start_row, start_row + ROWS, N, M, GROUP, span, first)
    sink_turns = tl.cdiv(sink_stop, KEYS)
    turns = sink_turns + tl.cdiv(high - band, KEYS)
    k += sequence * k_batch + head.to(tl.int64) * k_head
    v += sequence * v_batch + head.to(tl.int64) * v_head
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, VDIM), tl.float32)
    share = tl.cdiv(turns, SPLITS)
    for turn in range(split * share, tl.minimum(turns, (split + 1) * share)):
        key, limit, is_sink = _tile_of_keys(turn, sink_turns, sink_stop, band, high, KEYS)
        there = key < limit
        tile = _read(k, key.to(tl.int64) * k_row, there, DIM, D)
        z = tl.dot(query, tl.trans(tile), input_precision=PRECISION) * factor
        seen = _seen(position[:, None], key[None, :], limit, span, is_sink)
        z = tl.where(seen, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(z - finite[:, None])
        again = tl.exp2(top - finite)
        total = total * again + tl.sum(p, 1)
        tile = _read(v, key.to(tl.int64) * v_row, there, VDIM, E)
        values *= again[:, None]
        values = tl.dot(p.to(tile.dtype), tile, values, input_precision=PRECISION)
        top = higher
    values /= tl.where(total == 0.0, 1.0, total)[:, None]
    at = split.to(tl.int64) * o_split + sequence * o_batch + own * o_head + index * o_row
    _write(out, at, known, values, VDIM, E)
    at = split.to(tl.int64) * l_split + sequence * l_batch + own * l_head + index
    tl.store(lse + at, (top + tl.log2(total)) * _LN2, mask=known)


@triton.jit
def banded_merge(
    parts, part_lse, out, lse, count, N, heads, o_batch, o_head, o_row,
    SPLITS: tl.constexpr, E: tl.constexpr, VDIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The splits' results, of ``count`` rows in the order of sequences, heads and queries."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < count
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, VDIM), tl.float32)
    for split in range(SPLITS):
        own = tl.load(part_lse + split * count + row, mask=known, other=0.0)
        higher = tl.maximum(top, own)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        again, weight = tl.exp(top - finite), tl.exp(own - finite)
        total = total * again + weight
        tile = _read(parts, (split * count + row) * E, known, VDIM, E)
        values = values * again[:, None] + tile * weight[:, None]
        top = higher
    index, head = row % N, row // N
    at = (head // heads) * o_batch + (head % heads) * o_head + index * o_row
    _write(out, at, known, values / total[:, None], VDIM, E)
    tl.store(lse + row, top + tl.log(total), mask=known)


@triton.jit(do_not_specialize=["spans", "sinks"])
def banded_query_gradient(
    dout, q, k, v, out, lse, dq, dots, spans, sinks, N, M, scale,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, o_batch, o_head, o_row, dq_batch, dq_head, dq_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    DIM: tl.constexpr, VDIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of some queries, and into ``dots`` each row's sum of result times gradient.

    ``lse`` and ``dots`` are contiguous.
    """
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start_row = tl.program_id(0) * ROWS
    row = start_row + tl.arange(0, ROWS)
    known = row < N * GROUP
    own = (head * GROUP + row % GROUP).to(tl.int64)
    index = (row // GROUP).to(tl.int64)
    position = M - N + row // GROUP
    query = _read(q, sequence * q_batch + own * q_head + index * q_row, known, DIM, D)
    upstream = _read(dout, sequence * g_batch + own * g_head + index * g_row, known, VDIM, E)
    result = _read(out, sequence * o_batch + own * o_head + index * o_row, known, VDIM, E)
    dot = tl.sum(result.to(tl.float32) * upstream.to(tl.float32), 1)
    at = (sequence * HEADS * GROUP + own) * N + index
    tl.store(dots + at, dot, mask=known)
    normaliser = tl.load(lse + at, mask=known, other=0.0)
    span, first = _rule(spans, sinks, head, HEADS)
    sink_stop, band, high = _keys_seen(start_row, start_row + ROWS, N, M, GROUP, span, first)
    sink_turns = tl.cdiv(sink_stop, KEYS)
    turns = sink_turns + tl.cdiv(high - band, KEYS)
    k += sequence * k_batch + head.to(tl.int64) * k_head
    v += sequence * v_batch + head.to(tl.int64) * v_head
    gradient = tl.zeros((ROWS, DIM), tl.float32)
    for turn in range(turns):
        key, limit, is_sink = _tile_of_keys(turn, sink_turns, sink_stop, band, high, KEYS)
        there = key < limit
        keys = _read(k, key.to(tl.int64) * k_row, there, DIM, D)
        values = _read(v, key.to(tl.int64) * v_row, there, VDIM, E)
        z = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
        seen = _seen(position[:, None], key[None, :], limit, span, is_sink)
        p = tl.where(seen, tl.exp2((z - normaliser[:, None]) * _LOG2_E), 0.0)
        dz = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        dz = p * (dz - dot[:, None])
        gradient = tl.dot(dz.to(keys.dtype), keys, gradient, input_precision=PRECISION)
    at = sequence * dq_batch + own * dq_head + index * dq_row
    _write(dq, at, known, gradient * scale, DIM, D)


@triton.jit(do_not_specialize=["spans", "sinks"])
def banded_key_gradients(
    dout, q, k, v, lse, dots, dk, dv, spans, sinks, N, M, scale,
    g_batch, g_head, g_row, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    DIM: tl.constexpr, VDIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of some keys and values, over all rows of the group that see one of them."""
    head, sequence = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * KEYS
    key = start + tl.arange(0, KEYS)
    there = key < M
    place = head.to(tl.int64)
    at = sequence * k_batch + place * k_head + key.to(tl.int64) * k_row
    keys = _read(k, at, there, DIM, D)
    at = sequence * v_batch + place * v_head + key.to(tl.int64) * v_row
    values = _read(v, at, there, VDIM, E)
    span, first = _rule(spans, sinks, head, HEADS)
    # Sinks are seen from every later position, the others from those before the span ends.
    last = tl.where(start < first, M, tl.minimum(M, start + KEYS - 1 + span))
    begin = tl.maximum(0, start - (M - N)) * GROUP
    end = tl.maximum(0, last - (M - N)) * GROUP
    key_sum = tl.zeros((KEYS, DIM), tl.float32)
    value_sum = tl.zeros((KEYS, VDIM), tl.float32)
    for start_row in range(begin, end, ROWS):
        row = start_row + tl.arange(0, ROWS)
        known = row < end
        own = (head * GROUP + row % GROUP).to(tl.int64)
        index = (row // GROUP).to(tl.int64)
        position = M - N + row // GROUP
        query = _read(q, sequence * q_batch + own * q_head + index * q_row, known, DIM, D)
        at = sequence * g_batch + own * g_head + index * g_row
        upstream = _read(dout, at, known, VDIM, E)
        at = (sequence * HEADS * GROUP + own) * N + index
        normaliser = tl.load(lse + at, mask=known, other=0.0)
        dot = tl.load(dots + at, mask=known, other=0.0)
        z = tl.dot(keys, tl.trans(query), input_precision=PRECISION) * scale
        is_sink = (key < first)[:, None]
        seen = _seen(position[None, :], key[:, None], M, span, is_sink) & known[None, :]
        p = tl.where(seen, tl.exp2((z - normaliser[None, :]) * _LOG2_E), 0.0)
        value_sum = tl.dot(p.to(query.dtype), upstream, value_sum, input_precision=PRECISION)
        dz = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)
        dz = p * (dz - dot[None, :])
        key_sum = tl.dot(dz.to(query.dtype), query, key_sum, input_precision=PRECISION)
    at = sequence * dk_batch + place * dk_head + key.to(tl.int64) * dk_row
    _write(dk, at, there, key_sum * scale, DIM, D)
    at = sequence * dv_batch + place * dv_head + key.to(tl.int64) * dv_row
    _write(dv, at, there, value_sum, VDIM, E)
