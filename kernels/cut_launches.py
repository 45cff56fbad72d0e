"""How the kernels of `triton_cut` are launched: their tiles, and what they are given.

All of it needs Triton.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from memopt.kernels import triton_cut as kernels
from memopt.kernels.cut_cross_entropy import PART

# Tiles of rows that run at the same time, so that their hidden states stay in the shared cache.
_GROUP = 16
_LOSS_ROWS = 256
# Said, because Triton 3.9 warns where it is not.
_FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Tiles:
    """How the products are cut up.

    Attributes:
        rows: of a tile.
        columns: of a tile.
        step: of the inner dimension.
        warps: per program.
        stages: steps whose operands are in flight.
        precision: of products of float32.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    precision: str = "ieee"

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a launch."""
        return {
            "STEP": self.step,
            "PRECISION": self.precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **_FUSED,
        }


# By what the inputs are. "Ragged" are those of which Triton cannot tell that 128 bits may be read
# at a time. All compile without spills for sm_80, sm_90, sm_100 and gfx942, in Triton 3.7 and 3.9.
TILES = {
    "half": Tiles(128, 128, 64, 8, 3),
    "float32": Tiles(64, 64, 16, 4, 2),
    "tf32": Tiles(64, 64, 32, 8, 3, "tf32"),
    "ragged half": Tiles(64, 64, 32, 8, 2),
    "ragged float32": Tiles(32, 32, 16, 4, 2),
}


def tiles_of(x_NH: Tensor, weight_VH: Tensor) -> Tiles:
    """The tiles for a head's inputs: a function of dtypes and strides, so that runs are equal."""
    kind = "float32" if x_NH.dtype == torch.float32 else "half"
    if not all(_is_aligned(tensor) for tensor in (x_NH, weight_VH)):
        kind = f"ragged {kind}"
    elif kind == "float32" and torch.get_float32_matmul_precision() != "highest":
        kind = "tf32"
    tiles = TILES[kind]
    return replace(tiles, stages=2) if torch.version.hip else tiles


def _is_aligned(tensor: Tensor) -> bool:
    sizes = tensor.shape[1], tensor.stride(0), tensor.storage_offset()
    return tensor.stride(1) == 1 and all(size % 16 == 0 for size in sizes)


@dataclass(frozen=True)
class Problem:
    """A head and its targets, as the kernels take them.

    Attributes:
        x_NH: hidden states.
        weight_VH: one row per class, in their dtype.
        bias_V: added to the product, or None.
        target_N: class of each row, int64.
        class_weight_V: float32, or None.
        weight_sum: of all class weights, or None.
        smoothing: label smoothing.
        scale: factor on the product.
        softcap: bound on the logits; 0 for none.
        tiles: how the products are cut up.
    """

    x_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    target_N: Tensor
    class_weight_V: Tensor | None
    weight_sum: Tensor | None
    smoothing: float
    scale: float
    softcap: float
    tiles: Tiles

    def at(self, rows: slice, classes: slice) -> tuple[Any, ...]:
        """Inputs of some rows and classes, for the first arguments of a kernel."""
        bias = None if self.bias_V is None else self.bias_V[classes]
        return (
            self.x_NH[rows],
            self.weight_VH[classes],
            bias,
            self.target_N[rows],
            self.class_weight_V,
        )

    @property
    def layout(self) -> tuple[Any, ...]:
        """Strides and factors, which every tile of logits takes."""
        factor = self.scale / (self.softcap or 1.0)
        return (
            self.x_NH.shape[1],
            *self.x_NH.stride(),
            *self.weight_VH.stride(),
            factor,
            self.softcap,
        )

    @property
    def constants(self) -> dict[str, Any]:
        """What is known at compile time."""
        return {
            "CAPPED": self.softcap != 0.0,
            "EVEN": self.x_NH.shape[1] % self.tiles.step == 0,
            "ROWS": self.tiles.rows,
            "CLASSES": self.tiles.columns,
            **self.tiles.options,
        }


def forward_columns(tiles: Tiles, *, smoothed: bool) -> int:
    """Columns of a tile in the forward: sums beside the log-sum-exps need registers, too."""
    return tiles.columns // 2 if smoothed else tiles.columns


def losses(p: Problem) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every row, `(N,)` each, float32."""
    rows, classes = len(p.x_NH), len(p.weight_VH)
    if rows == 0:
        nothing = p.x_NH.new_empty(0, dtype=torch.float32)
        return nothing, nothing.clone()
    parts, tiles = triton.cdiv(classes, PART), triton.cdiv(rows, p.tiles.rows)
    values, whole, picked = (p.x_NH.new_empty(rows, dtype=torch.float32) for _ in range(3))
    lse = p.x_NH.new_empty(parts, rows, dtype=torch.float32)
    columns = forward_columns(p.tiles, smoothed=p.smoothing != 0.0)
    spread = torch.empty_like(lse) if p.smoothing else None
    group = min(_GROUP, tiles)
    kernels.log_sum_exps_kernel[group, parts, triton.cdiv(tiles, group)](
        *p.at(slice(rows), slice(classes)), lse, picked, spread, rows, classes, *p.layout,
        TURNS=PART // columns, **{**p.constants, "CLASSES": columns},
    )  # fmt: skip
    kernels.losses_kernel[(triton.cdiv(rows, _LOSS_ROWS),)](
        lse, picked, spread, p.target_N, p.class_weight_V, p.weight_sum, values, whole,
        rows, classes, parts, p.smoothing, ROWS=_LOSS_ROWS, **_FUSED,
    )  # fmt: skip
    return values, whole


@dataclass(frozen=True)
class Upstream:
    """What a gradient needs besides the logits.

    Attributes:
        lse_N: log-sum-exps, float32.
        g_N: upstream gradient of every row's value, float32.
        h_N: of every row's log-sum-exp, or None.
        skip_below: share of a row's upstream gradient that does not count.
    """

    lse_N: Tensor
    g_N: Tensor
    h_N: Tensor | None
    skip_below: float


def gradient(
    p: Problem, rows: slice, classes: slice, up: Upstream, block: Tensor, alive: Tensor | None
) -> None:
    """Gradient of the raw product of some rows and classes, into the corner of ``block``.

    Args:
        p: the head and its targets.
        rows: of the hidden states.
        classes: of the weight.
        up: what comes from above.
        block: at least as large, in the model's dtype.
        alive: takes 1 for each tile that counts and 0 for others; None where all do.
    """
    count, width = rows.stop - rows.start, classes.stop - classes.start
    grid = triton.cdiv(count, p.tiles.rows), triton.cdiv(width, p.tiles.columns)
    h = None if up.h_N is None else up.h_N[rows]
    kernels.gradient_kernel[grid](
        *p.at(rows, classes), p.weight_sum, up.lse_N[rows], up.g_N[rows], h, block, alive,
        count, width, *p.layout, p.scale, p.smoothing, up.skip_below, classes.start,
        len(p.weight_VH), block.stride(0), 0 if alive is None else alive.stride(0),
        SMOOTHED=p.smoothing != 0.0, SKIPS=alive is not None, **p.constants,
    )  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """What a block of the gradient is multiplied by.

    Attributes:
        tiles: that the block was made by.
        block: `(M, K)` in its corner, of either order; zeros up to the next whole tile.
        operand: `(K, H)`.
        alive: which of the block's tiles count, in the block's order; None for all.
    """

    tiles: Tiles
    block: Tensor
    operand: Tensor
    alive: Tensor | None


def add_product(f: Factors, sums: Tensor | None, result: Tensor, first: bool, last: bool) -> None:
    """Add a block's product to those of the blocks before it.

    Args:
        f: the factors.
        sums: at least `(M, H)`, float32, or None where ``result`` is that itself.
        result: `(M, H)`: takes the sum in the end.
        first: whether there is nothing to add to.
        last: whether this is the end.
    """
    rows, width = result.shape
    wide = result if sums is None else sums
    straight = f.block.stride(1) == 1
    tile = (f.tiles.rows, f.tiles.columns) if straight else (f.tiles.columns, f.tiles.rows)
    notes = (0, 0) if f.alive is None else f.alive.stride()
    kernels.product_kernel[triton.cdiv(rows, tile[0]), triton.cdiv(width, tile[1])](
        f.block, f.operand, wide, result, f.alive, rows, len(f.operand), width,
        *f.block.stride(), *f.operand.stride(), wide.stride(0), result.stride(0), *notes,
        0 if first else rows, 0 if last else rows, SKIPS=f.alive is not None,
        ROWS=tile[0], COLUMNS=tile[1], **f.tiles.options,
    )  # fmt: skip


def add_columns(tiles: Tiles, block: Tensor, rows: int, sums: Tensor, *, first: bool) -> None:
    """Add the sums of a block's columns to those of the blocks before it.

    Args:
        tiles: that the block was made by.
        block: as it was written; zeros up to the next whole tile.
        rows: of it that count.
        sums: `(V,)`, float32.
        first: whether there is nothing to add to.
    """
    kernels.columns_kernel[(triton.cdiv(len(sums), tiles.columns),)](
        block, sums, rows, len(sums), block.stride(0), 0 if first else len(sums), ROWS=tiles.step,
        CLASSES=tiles.columns, **_FUSED,
    )  # fmt: skip
