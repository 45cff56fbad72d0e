"""A tensor in one buffer of codes and scales: what `memopt.kernels.quantise` makes."""

import pytest
import torch
import torch.nn.functional as F

from bench.meter import Meter
from memopt.errors import ConfigError
from memopt.kernels.compressed import (
    COMPRESS,
    DECOMPRESS,
    compress_scratch,
    compressed_bytes,
    decompress_scratch,
    is_symmetric,
)
from memopt.kernels.quantise import DEQUANTISE, QUANTISE
from memopt.passes.compress import Compress

NUMBERS = 32  # beside a tensor a number becomes one
SHAPES = ((64, 1024), (3, 5, 333), (7, 128), (2, 16))
CODES = [(8, False), (4, False), (8, True)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_comes_back_as_from_several_tensors(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    x = torch.randn(shape).to(dtype)
    kept = COMPRESS(x, bits, 64)
    parts = QUANTISE(x, bits, 64, is_symmetric(bits))
    expected = DEQUANTISE(*parts, list(shape), dtype, bits, 64)
    assert torch.equal(DECOMPRESS(kept, list(shape), dtype, bits, 64), expected)
    assert sum(p.nbytes for p in parts) <= kept.nbytes < sum(p.nbytes for p in parts) + 32
    assert kept.nbytes == compressed_bytes(shape, dtype, bits, 64)


def test_groups_of_128_take_half_of_bfloat16_and_a_thirtysecond() -> None:
    assert compressed_bytes((64, 1024), torch.bfloat16, 8, 128) == 64 * 1024 * (1 + 4 / 128)


@pytest.mark.parametrize(("bits", "floats"), CODES)
def test_the_operators_say_what_they_return(bits: int, floats: bool) -> None:
    x = torch.randn(6, 200)
    torch.library.opcheck(COMPRESS, (x, bits, 32, floats))
    kept = COMPRESS(x, bits, 32, floats)
    torch.library.opcheck(DECOMPRESS, (kept, [6, 200], torch.float32, bits, 32, floats))


@pytest.mark.parametrize(("bits", "floats"), CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_allocate_no_more_than_they_say(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, floats: bool
) -> None:
    x = torch.randn(shape).to(dtype)
    with Meter() as meter:
        kept = COMPRESS(x, bits, 64, floats)
    assert meter.peak_bytes <= kept.nbytes + compress_scratch(x, bits, 64, floats) + NUMBERS
    back = list(shape), dtype, bits, 64, floats
    with Meter() as meter:
        y = DECOMPRESS(kept, *back)
    assert meter.peak_bytes <= y.nbytes + decompress_scratch(kept, *back) + NUMBERS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floating_codes_keep_the_digits_of_small_numbers(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Each number of a group, whatever else is in it, down to a 2**-15th of the largest."""
    wide = torch.randn(shape, dtype=torch.float64) * torch.randn(shape, dtype=torch.float64).exp()
    x = wide.to(dtype)
    kept = COMPRESS(x, 8, 64, True)
    y = DECOMPRESS(kept, list(shape), dtype, 8, 64, True)
    assert y.dtype == dtype
    assert y.is_contiguous()
    filled = F.pad(x.double().abs(), (0, -shape[-1] % 64))
    largest = filled.reshape(*shape[:-1], -1, 64).amax(-1)
    step = largest.repeat_interleave(64, -1)[..., : shape[-1]] / 448
    bound = torch.maximum(x.double().abs() * 2**-4, step * 2**-10)
    rounding = 4 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
    assert bool(((y - x).double().abs() <= bound * 1.001 + rounding * x.double().abs()).all())
    assert kept.nbytes == compressed_bytes(shape, dtype, 8, 64)


def test_floating_codes_have_the_error_that_is_planned_with() -> None:
    x = torch.randn(256, 4096)
    y = DECOMPRESS(COMPRESS(x, 8, 128, True), [256, 4096], x.dtype, 8, 128, True)
    off = float((y - x).norm() / x.norm())
    assert off == pytest.approx(Compress(floats=True).loss, rel=0.1)


def test_floating_codes_bring_back_zeros_and_what_is_not_finite() -> None:
    x = torch.zeros(3, 64)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    y = DECOMPRESS(COMPRESS(x, 8, 64, True), [3, 64], x.dtype, 8, 64, True)
    assert bool((y[0] == 0).all())
    assert bool(y[1:].isnan().all())


def test_floating_codes_have_8_bits() -> None:
    with pytest.raises(ConfigError, match="floats=True with bits=4"):
        COMPRESS(torch.randn(4, 64), 4, 16, True)
    with pytest.raises(ConfigError, match="floats=True with bits=4"):
        Compress(bits=4, floats=True)


def test_other_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="group=48"):
        COMPRESS(torch.randn(4, 96), 8, 48)
