"""The row kernel against the eager rows that it replaces on a GPU, and against float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.ahead import TARGETS, Target
from bench.triton.gate import Build, Traffic, check, code
from memopt.kernels import triton_rows
from tests.kernels.row_cases import OPTIONS, Rows
from tests.references import (
    LOW_PRECISION,
    assert_draws_within_reference_error,
    assert_within_reference_error,
)

Tensor = torch.Tensor


def assert_near_float64(draw: Callable[[], Rows]) -> None:
    def results() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        rows = draw()
        return rows.kernel(), rows.double.eager(), rows.eager()

    assert_draws_within_reference_error(results)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_as_near_to_float64_as_eager_rows_are(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_near_float64(lambda: Rows.draw(dtype=dtype, **options))


@pytest.mark.parametrize("classes", [1, 2, 13, 1024, 8192, 8193, 20001])
@pytest.mark.parametrize("options", [OPTIONS[4], OPTIONS[7]], ids=str)
def test_any_number_of_classes_will_do(classes: int, options: dict[str, Any]) -> None:
    assert_near_float64(lambda: Rows.draw(4, classes, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [13, 50257, 128256])
def test_compiled_it_is_as_near_to_float64_as_eager_rows_are(
    options: dict[str, Any], dtype: torch.dtype, classes: int
) -> None:
    assert_near_float64(lambda: Rows.draw(64, classes, dtype=dtype, device="cuda", **options))


@pytest.mark.gpu
def test_compiled_twice_it_gives_the_same_bits() -> None:
    rows = Rows.draw(512, 50257, dtype=torch.bfloat16, device="cuda", **OPTIONS[7])
    pairs = zip(rows.kernel(), rows.kernel(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_large_logits_neither_overflow_nor_vanish() -> None:
    rows = Rows.draw(8, 300)
    rows.raw[:4] *= 1e4
    rows.raw[4:] -= 1e30
    assert_within_reference_error(rows.kernel(), rows.double.eager(), rows.eager())


def test_a_block_of_classes_that_are_ruled_out_leaves_the_others_alone() -> None:
    rows = Rows.draw(4, 8192 + 100)
    rows.loss.target_N.fill_(8192 + 7)
    rows.raw[:, :8192] = -torch.inf
    actual = rows.kernel()
    assert all(t.isfinite().all() for t in actual)
    assert not actual[2][:, :8192].any()
    assert_within_reference_error(actual, rows.double.eager(), rows.eager())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_spoils_its_row_and_no_other(bad: float) -> None:
    rows = Rows.draw(3, 100)
    rows.raw[1, 5] = bad
    for result in rows.kernel():
        assert [bool(r.isfinite().all()) for r in result] == [True, False, True]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_an_upstream_gradient_gets_zeros_whatever_it_holds(bad: float) -> None:
    rows = Rows.draw(3, 20_000, weighted=True, normaliser=True)
    assert rows.g is not None
    assert rows.h is not None
    rows.g[1] = rows.h[1] = 0
    rows.raw[1, 5] = bad
    gradient = rows.kernel()[2]
    assert not gradient[1].any()
    assert gradient[[0, 2]].any(1).all()
    rows.g[1], rows.h[1] = 0, 1  # a normaliser's gradient alone is one, too
    assert not rows.kernel()[2][1].isfinite().all()


def test_rows_apart_from_one_another_leave_what_is_between_them_alone() -> None:
    rows = Rows.draw(5, 301, **OPTIONS[4])
    wide = torch.full((5, 320), 7.0)
    wide[:, :301] = rows.raw
    triton_rows.run(wide[:, :301], rows.loss, rows.scale, rows.softcap, rows.g, rows.h)
    assert torch.equal(wide[:, :301], rows.kernel()[2])
    assert (wide[:, 301:] == 7).all()


def test_upstream_gradients_may_have_any_strides() -> None:
    rows = Rows.draw(6, 50, **OPTIONS[6])
    h = torch.randn(12)[::2]
    expanded = replace(rows, g=torch.ones(1).expand(6), h=h)
    dense = replace(rows, g=torch.ones(6), h=h.clone())
    assert torch.equal(expanded.kernel()[2], dense.kernel()[2])


def test_offsets_beyond_two_to_the_31st_reach_their_rows() -> None:
    """With a stride that is an int32 itself: the product with the row's number is none."""
    stride = 2**30 + 8  # of virtual memory; only a few pages are touched
    rows = Rows.draw(3, 40, dtype=torch.float16)
    far = torch.empty(2 * stride + 40, dtype=torch.float16).as_strided((3, 40), (stride, 1))
    far.copy_(rows.raw)
    triton_rows.run(far, rows.loss, rows.scale, rows.softcap, rows.g, rows.h)
    assert torch.equal(far, rows.kernel()[2])


@pytest.mark.parametrize("wrong", [1031, -1, 2**40])
def test_a_class_out_of_range_fails_before_the_kernel_runs(wrong: int) -> None:
    rows = Rows.draw()
    rows.loss.target_N[3] = wrong
    with pytest.raises(RuntimeError, match="out of bounds"):
        rows.kernel()


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[7]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [9_011, 16_384])
def test_the_gate_passes_it(options: dict[str, Any], dtype: torch.dtype, classes: int) -> None:
    rows = Rows.draw(24, classes, dtype=dtype, **options)  # few rows are right by luck
    found = check(rows.kernel, rows.double.eager(), rows.eager(), declared(rows))
    assert found == []


def test_values_alone_take_one_read() -> None:
    rows = Rows.draw(6, 32_768, trained=False)
    found = check(rows.kernel, rows.double.eager(), rows.eager(), declared(rows))
    assert found == []


def test_a_row_without_an_upstream_gradient_is_read_once() -> None:
    rows = Rows.draw(6, 32_768)
    assert rows.g is not None
    rows.g.zero_()
    once = replace(declared(rows), l2_bytes=2 * rows.raw.nbytes)
    assert check(rows.kernel, rows.double.eager(), rows.eager(), once) == []


def declared(rows: Rows) -> Traffic:
    """One read of the products, and to train another one and a write of the gradients.

    From memory the second read costs nothing if the cache keeps the chunk, which the count of
    ``dram_bytes`` supposes. Class weights are read once from memory, and beside every read of
    the products from the cache.
    """
    reads, writes = (1, 0) if rows.g is None else (2, 1)
    chunk = rows.raw.nbytes
    weights = rows.raw.shape[1] * 4 if rows.loss.weight_V is not None else 0
    each_row = 6 * 32 * len(rows.raw)  # a sector each: own product, target, g, h, value, lse
    return Traffic(
        dram_bytes=chunk * (1 + writes) + weights,
        l2_bytes=chunk * (reads + writes) + weights * reads * len(rows.raw) + each_row,
    )


def compiled(dtype: torch.dtype, classes: int, *, full: bool, trained: bool = True) -> Build:
    """The launch for rows of this length: with every option, or with none."""
    block, warps = triton_rows.block_and_warps(classes)
    vector = torch.float32
    arguments = {
        "raw_ptr": dtype,
        "own_ptr": dtype,
        "target_ptr": torch.int64,
        "weight_ptr": vector if full else None,
        "g_ptr": vector if trained else None,
        "h_ptr": vector if full and trained else None,
        "value_ptr": vector,
        "lse_ptr": vector,
        "row_stride": classes,
        "classes": classes,
        **dict.fromkeys(("scale", "factor", "softcap", "kept", "each"), 0.5),
        "CAPPED": full,
        "SMOOTHED": full,
        "BLOCK": block,
    }
    options = {"num_warps": warps}
    return Build(kernel=triton_rows.cross_entropy_rows, arguments=arguments, options=options)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_compiles_without_spills_to_vector_loads(
    dtype: torch.dtype, full: bool, target: Target
) -> None:
    assert code(compiled(dtype, 128_256, full=full), [target]) == []


def test_values_alone_compile_too() -> None:
    assert code(compiled(torch.bfloat16, 128_256, full=True, trained=False), [80, 90]) == []
