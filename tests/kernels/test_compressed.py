"""A tensor in one buffer of codes and scales: what `memopt.kernels.quantise` makes."""

import pytest
import torch

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

NUMBERS = 32  # beside a tensor a number becomes one
SHAPES = ((64, 1024), (3, 5, 333), (7, 128), (2, 16))
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


@pytest.mark.parametrize("bits", [8, 4])
def test_the_operators_say_what_they_return(bits: int) -> None:
    x = torch.randn(6, 200)
    torch.library.opcheck(COMPRESS, (x, bits, 32))
    kept = COMPRESS(x, bits, 32)
    torch.library.opcheck(DECOMPRESS, (kept, [6, 200], torch.float32, bits, 32))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_allocate_no_more_than_they_say(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    x = torch.randn(shape).to(dtype)
    with Meter() as meter:
        kept = COMPRESS(x, bits, 64)
    assert meter.peak_bytes <= kept.nbytes + compress_scratch(x, bits, 64) + NUMBERS
    back = list(shape), dtype, bits, 64
    with Meter() as meter:
        y = DECOMPRESS(kept, *back)
    assert meter.peak_bytes <= y.nbytes + decompress_scratch(kept, *back) + NUMBERS


def test_other_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="group=48"):
        COMPRESS(torch.randn(4, 96), 8, 48)
