"""Every way to cut a cross-entropy compiles for every target, without spills."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.ahead import TARGETS, Target, compile_for
from memopt.kernels import cut_cross_entropy as cut
from memopt.kernels import cut_launches, triton_cut
from memopt.kernels.cut_launches import TILES, Tiles

BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64
# A head of a usual size, and one of whose strides nothing is known.
EVEN, ODD = (8192, 4096, 128_256), (8191, 4095, 128_255)


def logits_arguments(dtype: torch.dtype, shape: tuple[int, int, int], tiles: Tiles) -> Any:
    rows, width, classes = shape
    return {
        "x": dtype, "weight": dtype, "bias": dtype, "target": I64, "class_weight": F32,
        "lse": F32, "N": rows, "V": classes, "H": width, "x_row": width, "x_col": 1,
        "w_row": width, "w_col": 1, "factor": 0.5, "softcap": 30.0, "CAPPED": True,
        "EVEN": width % tiles.step == 0, "ROWS": tiles.rows, "CLASSES": tiles.columns,
        **tiles.options,
    }  # fmt: skip


def forward_build(
    dtype: torch.dtype, shape: tuple[int, int, int], tiles: Tiles, *, smoothed: bool
) -> Any:
    columns = cut_launches.forward_columns(tiles, smoothed=smoothed)
    return triton_cut.log_sum_exps_kernel, {
        **logits_arguments(dtype, shape, tiles), "picked": F32,
        "spread": F32 if smoothed else None, "TURNS": cut.PART // columns, "CLASSES": columns,
    }  # fmt: skip


def gradient_build(dtype: torch.dtype, shape: tuple[int, int, int], tiles: Tiles) -> Any:
    shared = logits_arguments(dtype, shape, tiles)
    return triton_cut.gradient_kernel, {
        **shared, "weight_sum": F32, "g": F32, "h": F32, "block": dtype, "alive": torch.int32,
        "N": cut.BLOCK, "V": cut.BLOCK, "scale": 0.5, "smoothing": 0.1, "skip_below": 0.1,
        "first_class": 0, "all_classes": shape[2], "stride": cut.BLOCK, "alive_row": 64,
        "SMOOTHED": True, "SKIPS": True,
    }  # fmt: skip


def product_build(
    dtype: torch.dtype, shape: tuple[int, int, int], tiles: Tiles, *, flipped: bool = False
) -> Any:
    width = shape[1]
    tile = (tiles.columns, tiles.rows) if flipped else (tiles.rows, tiles.columns)
    strides = (1, cut.BLOCK) if flipped else (cut.BLOCK, 1)
    return triton_cut.product_kernel, {
        "block": dtype, "operand": dtype, "wide": F32, "result": dtype, "alive": None,
        "M": cut.BLOCK, "K": cut.BLOCK, "H": width, "block_row": strides[0],
        "block_col": strides[1], "o_row": width, "o_col": 1, "wide_row": width,
        "result_row": width, "alive_row": 0, "alive_col": 0, "old": cut.BLOCK, "kept": 0,
        "SKIPS": False, "ROWS": tile[0], "COLUMNS": tile[1], **tiles.options,
    }  # fmt: skip


BUILDS: dict[str, Callable[..., Any]] = {
    "forward": functools.partial(forward_build, smoothed=False),
    "smoothed forward": functools.partial(forward_build, smoothed=True),
    "gradient": gradient_build,
    "hidden states": product_build,
    "weight": functools.partial(product_build, flipped=True),
}


def assert_compiles(name: str, build: str, target: Target) -> None:
    dtype, shape = BF16 if "half" in name else F32, ODD if "ragged" in name else EVEN
    tiles = TILES[name] if isinstance(target, int) else replace(TILES[name], stages=2)
    kernel, arguments = BUILDS[build](dtype, shape, tiles)
    report = compile_for(kernel, arguments, target)
    assert report.problems() == []
    exact_on_nvidia = name.endswith("float32") and isinstance(target, int)
    assert bool(report.matrix_products) is not exact_on_nvidia
    assert report.vector_loads or "ragged" in name


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_without_spills_to_products_of_the_tensor_cores(
    build: str, target: Target
) -> None:
    assert_compiles("half", build, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TILES if name != "half"])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("target", TARGETS)
def test_all_other_ways_to_cut_compile_without_spills(
    name: str, build: str, target: Target
) -> None:
    assert_compiles(name, build, target)
