"""The repaired interpreter against PyTorch, operation by operation."""

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs
from triton.runtime import interpreter as stock
from triton.runtime.errors import InterpreterError

from bench.triton.builder import nearest_bf16
from bench.triton.interpreter import install
from bench.triton.mode import interpreting
from tests.bench import sample_kernels as kernels

install()
Tensor = torch.Tensor
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_operation_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x, y = (torch.randn(1000).to(dtype) for _ in range(2))
    out = torch.full_like(x, torch.nan)
    kernels.scale_and_shift[(4,)](x, y, out, 1000, 0.3, BLOCK=256)
    assert torch.equal(out, x * y + torch.tensor(0.3, dtype=dtype))


def test_bfloat16_is_rounded_to_nearest_even_and_keeps_what_is_not_finite() -> None:
    bits = torch.arange(-(2**31), 2**31, 2**13 + 1).to(torch.int32)
    x = bits.view(torch.float32)
    expected = x.bfloat16().float()
    rounded = torch.from_numpy(nearest_bf16(x.numpy()))
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)
    low_nan = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    assert torch.from_numpy(nearest_bf16(low_nan.numpy())).isnan().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_functions_of_other_kernels_and_of_libdevice_are_interpreted(dtype: torch.dtype) -> None:
    x = torch.randn(100).to(dtype)
    out = torch.full((2,), torch.nan)
    kernels.sum_and_tanh[(1,)](x, out, 100, BLOCK=128)
    assert abs(out[0] - x.double().sum()) <= torch.finfo(dtype).eps * x.double().abs().sum()
    torch.testing.assert_close(out[1], x.float().max().tanh())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_product_adds_up_in_float32(dtype: torch.dtype) -> None:
    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    out = torch.full((32, 32), torch.nan)
    kernels.product[(1,)](a, b, out, SIZE=32, PRECISION="ieee")
    torch.testing.assert_close(out, a.float() @ b.float())


def test_a_product_of_float32_uses_tf32_unless_told_otherwise() -> None:
    a, b = torch.randn(32, 32), torch.eye(32)
    out = torch.full((32, 32), torch.nan)
    kernels.product[(1,)](a, b, out, SIZE=32, PRECISION="tf32")
    assert not torch.equal(out, a)
    assert not (out.view(torch.int32) & 0x1FFF).any()
    torch.testing.assert_close(out, a, rtol=2**-11, atol=0)


@pytest.mark.parametrize("config", [0, 1])
def test_the_configuration_of_an_autotuned_kernel_is_chosen(config: int) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with interpreting(config=config):
        kernels.tuned[(1,)](out, 40)
    assert out.item() == 41 + config


def test_an_int32_that_overflows_raises() -> None:
    x, out = torch.tensor([2**31 - 2], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kernels.add[(1,)](x, out, 1, ADDED=0)
    assert out.item() == 2**31 - 1
    with pytest.raises(InterpreterError, match="int32 overflow"):
        kernels.add[(1,)](x, out, 1, ADDED=1)


def test_a_masked_lane_reads_nan_where_no_value_is_given() -> None:
    x, out = torch.ones(8), torch.zeros(8)
    kernels.masked[(1,)](x, out, 5, BLOCK=8)
    assert out.isnan().tolist() == [False] * 5 + [True] * 3


def test_installing_twice_changes_nothing_more() -> None:
    before = stock._implicit_cvt
    install()
    assert stock._implicit_cvt is before


def test_kernels_that_are_interpreted_from_the_start_are_refused() -> None:
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
            install()
