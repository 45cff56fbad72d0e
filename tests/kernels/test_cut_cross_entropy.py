"""Cross-entropy without logits in memory: numbers, order, bounds and bytes moved."""

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.gate import Traffic, check
from memopt.kernels import cut_launches
from memopt.kernels.cut_launches import TILES
from memopt.kernels.rows import IndexTargets
from tests.kernels.cut_cases import FULL, OPTIONS, Case, assert_near_float64
from tests.references import LOW_PRECISION, assert_same_bits

Tensor = torch.Tensor


@pytest.fixture
def memory_of_nan() -> Any:
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_as_near_to_float64_as_chunks_are(
    memory_of_nan: None, options: dict[str, Any], dtype: torch.dtype
) -> None:
    assert_near_float64(lambda: Case.draw(dtype=dtype, **options))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 16, 300), (130, 33, 259), (129, 16, 257), (3, 16, 2100), (70, 7, 65)]
)
def test_any_size_will_do(memory_of_nan: None, shape: tuple[int, int, int]) -> None:
    assert_near_float64(lambda: Case.draw(*shape, **FULL))


@pytest.mark.parametrize("name", TILES)
def test_every_way_to_cut_is_as_near_to_float64(
    memory_of_nan: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(cut_launches, "tiles_of", lambda x, weight: TILES[name])
    dtype = torch.bfloat16 if "half" in name else torch.float32
    case = Case.draw(70, 40, 140, dtype=dtype, **FULL)
    if "tf32" in name:  # no reference in that precision runs on a CPU
        unit = 2.0**-10 * case.layer.x_NH.shape[1]
        torch.testing.assert_close(case.cut(), case.chunked(), rtol=unit, atol=unit)
    else:
        assert_near_float64(lambda: Case.draw(70, 40, 140, dtype=dtype, **FULL), draws=2)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_sums_over_many_blocks_are_as_near_to_float64(
    memory_of_nan: None, dtype: torch.dtype
) -> None:
    assert_near_float64(lambda: Case.draw(300, 32, 300, dtype=dtype, **FULL), draws=1, block=128)


def test_each_gradient_is_the_same_whichever_others_are_wanted() -> None:
    case = Case.draw(140, 16, 150, **FULL)
    values, lse, *gradients = case.cut(block=128)
    for at in range(3):
        wanted = (at == 0, at == 1, at == 2)
        only = replace(case, wanted=wanted).cut(block=128)
        assert_same_bits(only, [values, lse, gradients[at]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("skip_below", [0.0, 2**-12])
def test_nothing_depends_on_the_order_of_programs_nor_reaches_out_of_bounds(
    memory_of_nan: None, dtype: torch.dtype, skip_below: float
) -> None:
    case = Case.draw(140, 16, 150, dtype=dtype, **FULL)
    unbounded = Traffic(dram_bytes=2**40, l2_bytes=2**40, coalescing=0.0)

    def run() -> list[Tensor]:
        return case.cut(block=128, skip_below=skip_below)

    assert check(run, case.double.chunked(), case.chunked(), unbounded) == []


def test_two_runs_are_equal_bit_by_bit() -> None:
    case = Case.draw(150, 32, 270, **FULL)
    assert_same_bits(case.cut(), case.cut())


def test_it_moves_what_tiles_of_this_size_must() -> None:
    rows, width, classes, side = 256, 64, 384, 128
    case = Case.draw(rows, width, classes)
    x, weight = 2 * rows * width, 2 * classes * width
    down, across = rows // side, classes // side
    block = 2 * rows * classes
    logits = across * x + down * weight  # as often as there are tiles beside
    vectors = rows * (16 + 3 * 8) + across * rows * 2 * 16 + across * rows * 8
    found = check(
        case.cut,
        case.double.chunked(),
        case.chunked(),
        Traffic(
            # Logits three times; blocks written and read twice; each operand of a product, and
            # its result.
            dram_bytes=3 * (x + weight) + 4 * block + 2 * (x + weight) + vectors,
            l2_bytes=3 * logits + 4 * block + logits + x + weight + vectors,
        ),
    )
    assert found == []


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_without_an_upstream_gradient_gets_none_whatever_it_holds(bad: float) -> None:
    case = Case.draw(20, 16, 300, **FULL)
    assert case.g is not None
    assert case.h is not None
    case.g[3] = case.h[3] = 0
    case.layer.x_NH[3, 5] = bad
    gradient = replace(case, wanted=(True, False, False)).cut()[2]
    assert not gradient[3].any()
    assert gradient.isfinite().all()


def test_classes_that_are_ruled_out_leave_the_others_alone() -> None:
    case = Case.draw(20, 16, 300, bias=True)
    assert case.layer.bias_V is not None
    case.layer.bias_V[:256] = -torch.inf  # two whole tiles
    case.loss.target_N.fill_(270)
    actual = case.cut()
    assert all(t.isfinite().all() for t in actual)
    assert not actual[3][:256].any()
    kept = replace(
        case,
        layer=replace(
            case.layer, weight_VH=case.layer.weight_VH[256:], bias_V=case.layer.bias_V[256:]
        ),
        loss=IndexTargets(case.loss.target_N - 256, None, 0.0),
    )
    torch.testing.assert_close(actual[:2], kept.cut()[:2])


@pytest.mark.parametrize("wrong", [200, -1, 2**40])
def test_a_class_out_of_range_fails(wrong: int) -> None:
    case = Case.draw()
    case.loss.target_N[7] = wrong
    with pytest.raises(RuntimeError, match="out of bounds"):
        case.cut()


def test_inputs_and_upstream_gradients_may_have_any_strides() -> None:
    case = Case.draw(40, 32, 90, **FULL)
    dense = replace(case, g=torch.ones(40), h=torch.arange(40.0))
    x, weight = (t.t().contiguous().t() for t in (case.layer.x_NH, case.layer.weight_VH))
    strided = replace(
        dense,
        layer=replace(case.layer, x_NH=x, weight_VH=weight),
        g=torch.ones(1).expand(40),
        h=torch.arange(0, 40, 0.5)[::2],
    )
    actual, expected = strided.cut(), dense.cut()
    assert all(t.is_contiguous() for t in actual)
    torch.testing.assert_close(actual, expected)


def test_offsets_beyond_two_to_the_31st_reach_their_rows() -> None:
    case, stride = Case.draw(2, 16, 40), 2**31 + 16  # only a few pages of it are touched
    far = torch.empty(stride + 16, dtype=torch.bfloat16).as_strided((2, 16), (stride, 1))
    far.copy_(case.layer.x_NH)
    moved = replace(case, layer=replace(case.layer, x_NH=far))
    assert_same_bits(moved.cut(), case.cut())


def test_without_rows_gradients_are_zero() -> None:
    values, lse, x, weight, bias = Case.draw(0, 16, 40, bias=True).cut()
    assert not values.numel() + lse.numel() + x.numel()
    assert not weight.any()
    assert not bias.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "shape", [(100, 48, 200), (4099, 1000, 5003), (3000, 768, 50_257)], ids=str
)
def test_compiled_it_is_as_near_to_float64_as_chunks_are(
    options: dict[str, Any], dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    assert_near_float64(lambda: Case.draw(*shape, dtype=dtype, device="cuda", **options), draws=2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_compiled_twice_it_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = Case.draw(4096, 1024, 32_000, dtype=dtype, device="cuda", **FULL)
    assert_same_bits(case.cut(), case.cut())
