"""Masks of bits: their order, what draws them, and the gradients that they give."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from memopt.errors import ConfigError
from memopt.kernels import bits, masking
from memopt.kernels.bits import APPLY_BITS, PACK_BITS, UNPACK_BITS
from memopt.kernels.masking import DROPOUT_BITS, RELU_BITS
from memopt.kernels.philox import random_words
from tests.references import LOW_PRECISION
from tests.scratch import assert_scratch_is_stated

Tensor = torch.Tensor
SEED = torch.tensor(20240229)


def numpy_bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def views(draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Tensors of many sizes and strides; the kernels' tiles have 2048 and 4096 entries."""
    odd = {str(n): draw(n) for n in (1, 7, 8, 9, 2047, 2049, 4104, 4609)}
    return {
        **odd,
        "no dimensions": draw(3)[1],
        "even rows of whole bytes": draw(5, 3, 16)[:, 1],
        "even rows of parts of bytes": draw(5, 3, 13)[:, 1],
        "wide rows": draw(3, 5000)[:, 8:4808],
        "uneven rows": draw(2, 3, 4, 8).transpose(1, 2),
        "columns": draw(16, 24).t(),
        "one value": draw(1).expand(4, 40),
        "nothing": draw(3, 0),
    }


@settings(max_examples=50)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    transposed=st.booleans(),
    density=st.floats(0, 1),
)
def test_a_mask_comes_back_from_its_bits_which_are_in_the_order_of_numpy(
    shape: list[int], transposed: bool, density: float
) -> None:
    mask = torch.rand(shape) < density
    mask = mask.movedim(0, -1) if transposed and shape else mask
    packed = PACK_BITS(mask)
    assert torch.equal(packed, numpy_bits(mask))
    assert torch.equal(UNPACK_BITS(packed, mask.shape), mask)


@pytest.mark.parametrize("name", views(torch.rand))
def test_interpreted_the_kernels_give_the_same_bits(name: str) -> None:
    triton_bits = interpreted()
    mask, x = views(lambda *n: torch.rand(n) < 0.5)[name], views(torch.randn)[name]
    (packed,) = triton_bits.pack(mask)
    assert torch.equal(packed, numpy_bits(mask))
    assert torch.equal(triton_bits.unpack(packed, list(mask.shape))[0], mask)
    for mine, plain in (
        (triton_bits.dropout(x, SEED, 0.3), DROPOUT_BITS(x, SEED, 0.3)),
        (triton_bits.relu(x), RELU_BITS(x)),
        (triton_bits.apply(x, packed, 1.5), [APPLY_BITS(x, packed, 1.5)]),
    ):
        for actual, expected in zip(mine, plain, strict=True):
            assert torch.equal(actual, expected)


def interpreted() -> Any:
    pytest.importorskip("triton")
    from bench.triton.interpreter import install
    from memopt.kernels import triton_bits

    install()
    return triton_bits


def test_words_are_those_of_the_published_test_vector() -> None:
    words = random_words(torch.tensor([0]), torch.tensor(0))
    assert words.tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 + 5, -(2**63), 2**63 - 1])
def test_words_are_those_of_triton(seed: int) -> None:
    interpreted()
    from tests.bench import sample_kernels

    counter = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**62])
    out = torch.empty(4 * len(counter), dtype=torch.int64)
    sample_kernels.random_words[(1,)](torch.tensor(seed), counter, out, BLOCK=len(counter))
    assert torch.equal(random_words(counter, torch.tensor(seed)), out)


def deviations(kept: Tensor, share: float) -> float:
    """How many standard deviations the number of kept entries is away from what is expected."""
    expected = kept.numel() * share
    return abs(int(kept.sum()) - expected) / math.sqrt(expected * (1 - share))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_what_is_kept_is_right_overall_in_each_bit_and_beside_each_other(
    p: float,
) -> None:
    count, keep = 2**20, 1 - p
    _, packed = DROPOUT_BITS(torch.ones(count), SEED, p)
    kept = UNPACK_BITS(packed, [count])
    assert deviations(kept, keep) < 4
    for place in range(8):
        assert deviations(kept[place::8], keep) < 4
    for distance in (1, 2, 4, 8, 1024):
        both = kept[distance:] & kept[:-distance]  # neighbours share one, which widens the spread
        assert deviations(both, keep**2) < 4 * math.sqrt(1 + 2 * keep / (1 + keep))
    _, other = DROPOUT_BITS(torch.ones(count), SEED + 1, p)
    assert deviations(kept & UNPACK_BITS(other, [count]), keep**2) < 4


def test_drawn_in_pieces_the_mask_is_that_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1003)
    whole = DROPOUT_BITS(x, SEED, 0.4)
    monkeypatch.setattr(masking, "_DRAWN_AT_ONCE", 16)
    assert all(map(torch.equal, DROPOUT_BITS(x, SEED, 0.4), whole))


def test_nothing_and_everything_is_dropped_at_the_ends() -> None:
    x = torch.randn(1000)
    for dropout in (DROPOUT_BITS, interpreted().dropout):
        y, packed = dropout(x, SEED, 0.0)
        assert torch.equal(y, x)
        assert (packed == 255).all()
        y, packed = dropout(x, SEED, 1.0)
        assert not y.any()
        assert not packed.any()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_dropout_scales_what_it_keeps_and_so_does_its_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(33, 17).to(dtype).requires_grad_()
    y, packed = DROPOUT_BITS(x, SEED, 0.25)
    factors = UNPACK_BITS(packed, [33, 17]) / 0.75
    assert torch.equal(y, (x.float() * factors).to(dtype))
    dy = torch.randn(33, 17).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, (dy.float() * factors).to(dtype))


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_relu_and_its_gradient_are_those_of_torch(dtype: torch.dtype) -> None:
    values = [-1.0, -0.0, 0.0, 2.0, torch.inf, -torch.inf, torch.nan]
    x = torch.tensor(values).repeat(5).to(dtype).requires_grad_()
    dy = torch.tensor([3.0, torch.inf, torch.nan, 0.0, 5.0]).repeat_interleave(7).to(dtype)
    mine = RELU_BITS(x)[0], *torch.autograd.grad(RELU_BITS(x)[0], x, dy)
    plain = torch.relu(x), *torch.autograd.grad(torch.relu(x), x, dy)
    for actual, expected in zip(mine, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    y, packed = interpreted().relu(x.detach())
    torch.testing.assert_close(y, plain[0].detach(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(packed, RELU_BITS(x)[1])


def test_a_dropped_nan_is_one_as_in_eager_code() -> None:
    x = torch.full((64,), torch.nan)
    for dropout in (DROPOUT_BITS, interpreted().dropout):
        assert dropout(x, SEED, 0.5)[0].isnan().all()


def test_gradients_are_right_to_the_second_order() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    for function in (lambda t: DROPOUT_BITS(t, SEED, 0.4)[0], lambda t: RELU_BITS(t)[0]):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("function", [lambda x: DROPOUT_BITS(x, SEED, 0.1), RELU_BITS])
def test_a_bit_an_entry_is_all_that_is_saved(function: Callable[[Tensor], Any]) -> None:
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x = torch.randn(1001, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y, packed = function(x)
    assert y.requires_grad
    assert not packed.requires_grad
    assert sum(t.nbytes for t in saved) == 126


def test_offsets_beyond_two_to_the_31st_reach_their_rows() -> None:
    triton_bits = interpreted()
    stride = 2**31 + 8  # of virtual memory; only a few pages are touched
    x = torch.randn(2, 40).to(torch.float16)
    far = torch.empty(stride + 40, dtype=torch.float16).as_strided((2, 40), (stride, 1))
    far.copy_(x)
    kept = torch.empty(stride + 40, dtype=torch.bool).as_strided((2, 40), (stride, 1))
    kept.copy_(x > 0)
    packed = PACK_BITS(x > 0)
    assert torch.equal(triton_bits.pack(kept)[0], packed)
    assert all(map(torch.equal, triton_bits.relu(far), RELU_BITS(x)))
    assert all(map(torch.equal, triton_bits.dropout(far, SEED, 0.5), DROPOUT_BITS(x, SEED, 0.5)))
    assert torch.equal(triton_bits.apply(far, packed, 2.0)[0], APPLY_BITS(x, packed, 2.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PACK_BITS(torch.ones(3)), "the mask is torch.float32"),
        (lambda: UNPACK_BITS(torch.ones(2, dtype=torch.uint8), [17]), r"17 entries take .*\(3,\)"),
        (lambda: APPLY_BITS(torch.ones(8), torch.ones(1), 1.0), "the bits are torch.float32"),
        (lambda: DROPOUT_BITS(torch.ones(8), SEED, 1.5), "p=1.5"),
        (lambda: DROPOUT_BITS(torch.ones(8), torch.ones(1), 0.5), "the seed is torch.float32"),
        (lambda: DROPOUT_BITS(torch.ones(8), SEED.expand(2), 0.5), r"the seed is .*\(2,\)"),
    ],
)
def test_what_is_no_mask_or_no_seed_is_an_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("count", [2**20, 2**20 + 1])
def test_the_formulas_of_scratch_hold(dtype: torch.dtype, count: int) -> None:
    x = torch.randn(count).to(dtype)
    mask = x > 0
    packed = PACK_BITS(mask)
    assert_scratch_is_stated(bits.PACK_SPEC, mask)
    assert_scratch_is_stated(bits.UNPACK_SPEC, packed, [count])
    assert_scratch_is_stated(bits.APPLY_SPEC, x, packed, 2.0)
    assert_scratch_is_stated(masking.DROPOUT_SPEC, x, SEED, 0.5)
    assert_scratch_is_stated(masking.RELU_SPEC, x)
