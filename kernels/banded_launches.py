"""How the kernels of `triton_banded` are launched: their tiles, and how keys are split.

All of it needs Triton.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from memopt._torch import size_hint
from memopt.kernels import triton_banded as kernels
from memopt.kernels.band_tiles import rules
from memopt.kernels.banded_attention import check, unwritten, unwritten_backward
from memopt.kernels.serving import processors
from memopt.kernels.spec import Results
from memopt.kernels.wide import own_bytes

# Said, because Triton 3.9 warns where it is not.
_FUSED = {"enable_fp_fusion": True}
_LEAST_ROWS = 16  # of a matrix product
_MERGED_ROWS = 16
# Keys that are worth a program of their own.
_SPLIT_TILES = 4
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tiles:
    """How scores are cut up.

    Attributes:
        rows: of a tile, at most.
        keys: of a tile.
        warps: per program.
        stages: tiles whose operands are in flight.
    """

    rows: int
    keys: int
    warps: int
    stages: int


# By the size of an entry and the entries of a head. All compile without spills for sm_80, sm_90,
# sm_100 and gfx942.
FORWARD = {
    (2, 64): Tiles(128, 64, 4, 3),
    (2, 128): Tiles(64, 64, 4, 2),
    (2, 256): Tiles(64, 32, 8, 2),
    (4, 64): Tiles(32, 32, 4, 2),
    (4, 128): Tiles(32, 32, 4, 2),
    (4, 256): Tiles(32, 16, 8, 1),
}
BACKWARD = {
    (2, 64): Tiles(64, 64, 4, 2),
    (2, 128): Tiles(32, 64, 8, 2),
    (2, 256): Tiles(32, 32, 8, 1),
    (4, 64): Tiles(32, 32, 8, 1),
    (4, 128): Tiles(16, 32, 8, 1),
    (4, 256): Tiles(16, 16, 8, 1),
}


def _constants(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, rows: int) -> dict[str, Any]:
    width, depth = q.shape[3], v.shape[3]
    exact = q.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "HEADS": k.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": width,
        "E": depth,
        "DIM": max(16, triton.next_power_of_2(width)),
        "VDIM": max(16, triton.next_power_of_2(depth)),
        "ROWS": min(tiles.rows, max(_LEAST_ROWS, triton.next_power_of_2(rows))),
        "KEYS": tiles.keys,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages if torch.version.hip is None else min(2, tiles.stages),
        **_FUSED,
    }


def _tiles(table: dict[tuple[int, int], Tiles], q: Tensor, v: Tensor) -> Tiles:
    width = max(64, triton.next_power_of_2(max(q.shape[3], v.shape[3])))
    return table[q.element_size(), width]


def by_entries(t: Tensor) -> Tensor:
    """The tensor with its entries side by side: itself, or a copy."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Sequence[int],
    sinks: Sequence[int],
    scale: float,
    splits: int | None = None,
) -> Results:
    """As the operator ``memopt::banded_attention``.

    Args:
        q: queries, like what follows.
        k: keys.
        v: values.
        spans: of each head of keys.
        sinks: of each head of keys.
        scale: of the scores.
        splits: into how many parts keys are split, instead of what fills the device.
    """
    check(q, k, v, spans, sinks)
    out, lse = unwritten(q, k, v)
    if not out.numel():
        return out, lse
    q, k, v = map(by_entries, (q, k, v))
    batch, heads, n, _ = q.shape
    kv_heads, m = k.shape[1:3]
    rows = n * heads // kv_heads
    c = _constants(q, k, v, _tiles(FORWARD, q, v), rows)
    if splits is None:
        splits = split_count(q, k, v)
    parts, part_lse = out[None], lse[None]
    if splits > 1:
        parts = q.new_empty(splits, batch, heads, n, v.shape[3], dtype=torch.float32)
        part_lse = lse.new_empty(splits, *lse.shape)
    grid = triton.cdiv(rows, c["ROWS"]), kv_heads, batch * splits
    kernels.banded_forward[grid](
        q, k, v, parts, part_lse, *rules(spans, sinks, m), n, m, scale * _LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *parts.stride()[:4],
        *part_lse.stride()[:3], SPLITS=splits, **c,
    )  # fmt: skip
    if splits > 1:
        count = lse.numel()
        kernels.banded_merge[(triton.cdiv(count, _MERGED_ROWS),)](
            parts, part_lse, out, lse, count, n, heads, *out.stride()[:3], SPLITS=splits,
            E=c["E"], VDIM=c["VDIM"], ROWS=_MERGED_ROWS, num_warps=4, **_FUSED,
        )  # fmt: skip
    return out, lse


def split_count(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Into how many parts keys are split: as many as would otherwise leave processors idle.

    Args:
        q: queries, fake or real.
        k: keys.
        v: values.
    """
    tiles = _tiles(FORWARD, q, v)
    batch, heads, keys = map(size_hint, k.shape[:3])
    rows = size_hint(q.shape[1]) // heads * size_hint(q.shape[2])
    programs = triton.cdiv(rows, tiles.rows) * heads * batch
    most = triton.cdiv(keys, tiles.keys * _SPLIT_TILES)
    return max(1, min(processors(q) // programs, most))


def forward_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """What `forward` allocates besides its results, in bytes."""
    copied = sum(own_bytes(t) for t in (q, k, v) if t.stride(3) != 1)
    splits = split_count(q, k, v)
    rows = size_hint(q.shape[0]) * size_hint(q.shape[1]) * size_hint(q.shape[2])
    return copied + (splits > 1) * splits * 4 * rows * (size_hint(v.shape[3]) + 1)


def backward(
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
    """As the operator ``memopt::banded_attention_backward``."""
    check(q, k, v, spans, sinks)
    dq, dk, dv = unwritten_backward(dout, q, k, v)
    if not dout.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout, q, k, v, out = map(by_entries, (dout, q, k, v, out))
    batch, heads, n, _ = q.shape
    kv_heads, m = k.shape[1:3]
    rows = n * heads // kv_heads
    c = _constants(q, k, v, _tiles(BACKWARD, q, v), rows)
    lse = lse.contiguous()
    dots = torch.empty_like(lse)
    table = *rules(spans, sinks, m), n, m, scale
    read = [stride for t in (dout, q, k, v) for stride in t.stride()[:3]]
    kernels.banded_query_gradient[triton.cdiv(rows, c["ROWS"]), kv_heads, batch](
        dout, q, k, v, out, lse, dq, dots, *table, *read, *out.stride()[:3], *dq.stride()[:3],
        **c,
    )  # fmt: skip
    kernels.banded_key_gradients[triton.cdiv(m, c["KEYS"]), kv_heads, batch](
        dout, q, k, v, lse, dots, dk, dv, *table, *read, *dk.stride()[:3], *dv.stride()[:3], **c
    )
    return dq, dk, dv
