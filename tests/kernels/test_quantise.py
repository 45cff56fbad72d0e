"""Quantised groups: how far values come back from where they were, and what has no number."""

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from memopt.errors import ConfigError
from memopt.kernels.quantise import DEQUANTISE, DEQUANTISE_SPEC, GROUPS, QUANTISE, SPEC
from tests.references import LOW_PRECISION
from tests.scratch import assert_scratch_is_stated

Tensor = torch.Tensor
Round = Callable[..., tuple[Tensor, Tensor]]
FORMS = [(bits, symmetric) for bits in (8, 4) for symmetric in (True, False)]


def there_and_back(x: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """What comes back, and the step of each entry."""
    packed, scale, zero = QUANTISE(x, bits, group, symmetric)
    y = DEQUANTISE(packed, scale, zero, x.shape, x.dtype, bits, group)
    return y, of_entries(scale, x, group)


def interpreted(x: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The same by the kernels."""
    pytest.importorskip("triton")
    from bench.triton.interpreter import install
    from memopt.kernels import triton_quantise

    install()
    packed, scale, zero = triton_quantise.quantise(x, bits, group, symmetric)
    (y,) = triton_quantise.dequantise(packed, scale, zero, [*x.shape], x.dtype, bits, group)
    return y, of_entries(scale, x, group)


def of_entries(scale: Tensor, x: Tensor, group: int) -> Tensor:
    return scale.repeat_interleave(group, -1)[..., : x.shape[-1]]


both = pytest.mark.parametrize("run", [there_and_back, interpreted], ids=["plain", "kernel"])


def allowed(x: Tensor, y: Tensor, step: Tensor) -> Tensor:
    """Half a step, what float32 rounds off, and a unit in the last place of the result."""
    info = torch.finfo(x.dtype)
    unit = info.eps * y.double().abs() + info.eps * info.smallest_normal
    return (0.5 + 2**-14) * step.double() + unit


@both
@settings(max_examples=40)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 140),
    group=st.sampled_from(GROUPS),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(LOW_PRECISION),
    shift=st.sampled_from([0.0, 5.0, -1000.0]),
    size=st.sampled_from([1e-6, 1.0, 100.0]),
)
def test_values_come_back_within_half_a_step(
    run: Round,
    rows: int,
    width: int,
    group: int,
    form: tuple[int, bool],
    dtype: torch.dtype,
    shift: float,
    size: float,
) -> None:
    x = (torch.randn(rows, width) * size + shift).to(dtype)
    y, step = run(x, form[0], group, form[1])
    assert (step > 0).all()
    assert ((x.double() - y.double()).abs() <= allowed(x, y, step)).all()


@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
def test_a_step_is_no_longer_than_the_codes_make_it(bits: int, symmetric: bool) -> None:
    x = torch.randn(16, 64)
    _, scale, _ = QUANTISE(x, bits, 64, symmetric)
    low, high = x.aminmax(dim=1)
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    codes = 2**bits - (1 if symmetric else 0)
    torch.testing.assert_close(scale[:, 0], span / (codes - 1))


@both
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
def test_zeros_come_back_as_zeros_and_so_do_those_of_a_relu(
    run: Round, dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    x = torch.randn(4, 100).relu().to(dtype)
    x[0] = 0
    y, _ = run(x, bits, 32, symmetric)
    assert not y[x == 0].any()
    assert y[0].eq(0).all()


@both
@pytest.mark.parametrize("value", [1.0, -3.14, 1e-44, -(2.0**-126), 6e4, 0.1, 1e38])
@pytest.mark.parametrize("bits", [8, 4])
def test_equal_values_come_back_as_they_were(run: Round, value: float, bits: int) -> None:
    x = torch.full((2, 40), value)
    y, step = run(x, bits, 32, False)
    assert torch.equal(x, y)
    y, step = run(x, bits, 32, True)
    assert ((x.double() - y.double()).abs() <= allowed(x, y, step)).all()
    if abs(value) > 2.0**-100:  # a code of its own, to two roundings
        torch.testing.assert_close(y, x, rtol=2**-23, atol=0)


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
def test_what_is_no_number_spoils_its_group_and_no_other(
    run: Round, bad: float, dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    x = torch.randn(3, 70).to(dtype)
    x[1, 40] = bad
    x[2, 65] = bad
    y, _ = run(x, bits, 32, symmetric)
    spoiled = torch.zeros(3, 70, dtype=torch.bool)
    spoiled[1, 32:64] = spoiled[2, 64:] = True
    assert torch.equal(y.isnan(), spoiled)
    assert y[~spoiled].isfinite().all()


@both
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_numbers_come_back_finite_or_not_at_all(
    run: Round, dtype: torch.dtype, bits: int
) -> None:
    largest = torch.finfo(dtype).max
    limit = largest if dtype == torch.float16 else torch.finfo(torch.float32).max / 2
    span = torch.linspace(-1, 1, 64, dtype=torch.float64)[None]
    for x, symmetric in ((span * limit, True), (span * (limit / 2), False)):
        x = x.to(dtype) if dtype != torch.bfloat16 else x.to(dtype) * 0.99
        y, step = run(x, bits, 64, symmetric)
        assert y.isfinite().all()
        assert ((x.double() - y.double()).abs() <= allowed(x, y, step)).all()
        if dtype != torch.float16:
            assert run(x * 1.02, bits, 64, symmetric)[0].isnan().all()


@both
@pytest.mark.parametrize("symmetric", [True, False])
def test_subnormal_numbers_come_back_within_half_a_step(run: Round, symmetric: bool) -> None:
    x = torch.randn(2, 64) * 1e-41
    assert x.ne(0).any()
    y, step = run(x, 8, 32, symmetric)
    assert (step == 2.0**-126).all()
    assert ((x.double() - y.double()).abs() <= allowed(x, y, step)).all()


def cases() -> Iterator[Tensor]:
    yield torch.randn(3, 200)
    yield torch.randn(2, 3, 5, 33).transpose(1, 2)
    yield torch.randn(4, 3, 64)[:, 1]
    yield torch.randn(64, 5).t()
    yield torch.randn(1, 1).expand(3, 20)
    yield torch.randn(17)
    yield torch.randn(3, 0)
    yield torch.randn(0, 3)
    yield torch.full((2, 32), torch.nan)
    yield (torch.arange(2 * 256) % 256).view(2, 256) + 0.5  # ties


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
def test_interpreted_the_kernel_gives_the_same_codes_scales_and_zero_points(
    dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    pytest.importorskip("triton")
    from bench.triton.interpreter import install
    from memopt.kernels import triton_quantise

    install()
    for x in cases():
        mine = triton_quantise.quantise(x.to(dtype), bits, 16, symmetric)
        for actual, expected in zip(mine, QUANTISE(x.to(dtype), bits, 16, symmetric), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_ties_are_rounded_to_the_even_code() -> None:
    x = torch.tensor([[-127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 127.0] + [0.0] * 9])
    packed, scale, _ = QUANTISE(x, 8, 16, True)
    assert scale.item() == 1
    assert (packed[0, :7].int() - 128).tolist() == [-127, 0, 2, 2, 0, -2, 127]


def test_the_earlier_code_of_four_bits_is_in_the_lower_half() -> None:
    x = torch.tensor([[*range(14), 15.0]])
    packed, scale, zero = QUANTISE(x, 4, 16, False)
    assert (scale.item(), zero.item()) == (1, 0)
    assert (packed[0] & 15).tolist() == [0, 2, 4, 6, 8, 10, 12, 15]
    assert (packed[0] >> 4).tolist() == [1, 3, 5, 7, 9, 11, 13, 0]


def test_codes_take_the_bytes_that_they_say() -> None:
    x = torch.randn(8, 1000, dtype=torch.bfloat16)
    for bits, symmetric, due in ((8, True, 1000 + 32), (8, False, 1064), (4, False, 564)):
        assert sum(t.nbytes for t in QUANTISE(x, bits, 128, symmetric)) == 8 * due


def test_float64_is_quantised_in_float64() -> None:
    x = 1 + torch.randn(4, 64, dtype=torch.float64) * 1e-12
    packed, scale, zero = QUANTISE(x, 8, 64, False)
    y = DEQUANTISE(packed, scale, zero, x.shape, x.dtype, 8, 64)
    assert scale.dtype == zero.dtype == torch.float64
    assert ((x - y).abs() <= allowed(x, y, scale)).all()


def test_another_dtype_may_come_back() -> None:
    x = torch.randn(4, 64)
    packed, scale, zero = QUANTISE(x, 8, 64, False)
    wide = DEQUANTISE(packed, scale, zero, x.shape, torch.float32, 8, 64)
    narrow = DEQUANTISE(packed, scale, zero, x.shape, torch.bfloat16, 8, 64)
    assert torch.equal(narrow, wide.to(torch.bfloat16))


def test_offsets_beyond_two_to_the_31st_reach_their_rows() -> None:
    stride = 2**31 + 8  # of virtual memory; only a few pages are touched
    x = torch.randn(2, 40).to(torch.float16)
    far = torch.empty(stride + 40, dtype=torch.float16).as_strided((2, 40), (stride, 1))
    far.copy_(x)
    assert torch.equal(interpreted(far, 8, 16, True)[0], there_and_back(x, 8, 16, True)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QUANTISE(torch.ones(2, 3), 3, 32, True), "bits=3"),
        (lambda: QUANTISE(torch.ones(2, 3), 8, 48, True), "group=48"),
        (lambda: QUANTISE(torch.ones(2, 3), 8, 8, True), "group=8"),
        (lambda: QUANTISE(torch.ones(()), 8, 32, True), "without dimensions"),
        (
            lambda: DEQUANTISE(
                *QUANTISE(torch.ones(2, 30), 4, 32, True), [2, 31], torch.float32, 4, 32
            ),
            r"\(2, 31\) in 4 bits takes torch.uint8, \(2, 16\)",
        ),
        (
            lambda: DEQUANTISE(
                *QUANTISE(torch.ones(2, 64), 8, 64, False), [2, 64], torch.float32, 8, 32
            ),
            r"\(2, 64\) in groups of 32 takes \(2, 2\)",
        ),
    ],
)
def test_other_bits_groups_and_shapes_are_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("width", [1024, 1001])
@pytest.mark.parametrize(("bits", "symmetric"), FORMS)
def test_the_formulas_of_scratch_hold(
    dtype: torch.dtype, width: int, bits: int, symmetric: bool
) -> None:
    x = torch.randn(512, width).to(dtype)
    args = x, bits, 128, symmetric
    assert_scratch_is_stated(SPEC, *args)
    back = *QUANTISE(*args), list(x.shape), dtype, bits, 128
    assert_scratch_is_stated(DEQUANTISE_SPEC, *back)
