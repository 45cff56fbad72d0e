"""Tiles of the gradient that are next to nothing may be skipped, if that is asked for."""

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.trace import trace
from memopt.kernels import cut_sweeps
from tests.kernels.cut_cases import FULL, Case
from tests.references import assert_same_bits

Tensor = torch.Tensor


def peaked(dtype: torch.dtype = torch.bfloat16) -> Case:
    """Half of the predictions are right and sure, as most of a trained model's are."""
    case = Case.draw(256, 64, 512, dtype=dtype)
    target = torch.arange(256)
    x = 2 * case.layer.weight_VH[target].float()
    x[:128] = torch.randn(128, 64)
    layer = replace(case.layer, x_NH=x.to(dtype), scale=2.0)
    return replace(case, layer=layer, loss=replace(case.loss, target_N=target))


def test_nothing_is_skipped_unless_that_is_asked_for() -> None:
    assert inspect.signature(cut_sweeps.run).parameters["skip_below"].default == 0.0
    case = Case.draw(**FULL)
    assert_same_bits(case.cut(), case.cut(skip_below=2.0**-126))


def test_skipping_is_off_by_no_more_than_what_is_skipped_and_saves_reading(
    record_property: Callable[[str, object], None],
) -> None:
    case, threshold = peaked(), 2**-12
    with trace() as exact_launches:
        exact = case.cut()
    with trace() as launches:
        actual = case.cut(skip_below=threshold)
    assert_same_bits(actual[:2], exact[:2])
    assert case.g is not None
    x, weight = case.layer.x_NH.float(), case.layer.weight_VH.float()
    each = threshold * abs(case.layer.scale)
    unit = torch.finfo(torch.bfloat16).eps
    of_x = each * case.g.abs() * weight.norm(dim=1).sum()
    of_weight = each * (case.g.abs() * x.norm(dim=1)).sum()
    off = [(a - e).float().norm(dim=1) for a, e in zip(actual[2:], exact[2:], strict=True)]
    assert (off[0] <= of_x + unit * exact[2].float().norm(dim=1)).all()
    assert (off[1] <= of_weight + unit * exact[3].float().norm(dim=1)).all()
    assert any(error.any() for error in off)
    share = [float(o.norm() / e.float().norm()) for o, e in zip(off, exact[2:], strict=True)]
    record_property("relative error of the gradients", share)
    moved, all_moved = (
        sum(a.l2_bytes for a in one if a.name == "product_kernel")
        for one in (launches, exact_launches)
    )
    assert moved < all_moved


def test_tiles_of_rows_that_do_not_count_are_skipped_without_an_error() -> None:
    case = Case.draw(256, 16, 256)
    assert case.g is not None
    case.g[:128] = 0
    assert_same_bits(case.cut(), case.cut(skip_below=2.0**-126))
