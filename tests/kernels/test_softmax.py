"""Softmax against PyTorch's own, against float64, and in bytes against liger-kernel's."""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from memopt.errors import ConfigError
from memopt.kernels.softmax import (
    BACKWARD_SPEC,
    ROW_ON_CHIP,
    SOFTMAX,
    SOFTMAX_BACKWARD,
    SPEC,
)
from tests.references import LOW_PRECISION, assert_equal_in_float64, doubles
from tests.scratch import assert_scratch_is_stated

Tensor = torch.Tensor
LONG = ROW_ON_CHIP + 1


def written_out(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    z = x * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return torch.softmax(z if mask is None else z + mask, -1)


def plain(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    result: Tensor = SOFTMAX(x, mask, scale, softcap)
    return result


def interpreted(x: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    pytest.importorskip("triton")
    from bench.triton.interpreter import install

    install()
    return SPEC.launch(x, mask, scale, softcap)[0]


both = pytest.mark.parametrize("run", [plain, interpreted], ids=["plain", "kernel"])
Run = Callable[[Tensor, Tensor | None, float, float], Tensor]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("shape", [None, (5, 7), (7,), (2, 1, 1, 7), (3, 1, 1), (2, 3, 5, 7)])
def test_results_and_gradients_are_those_of_code_written_out(
    shape: tuple[int, ...] | None, softcap: float
) -> None:
    inputs = [torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)]
    if shape is not None:
        inputs.append(torch.randn(shape, dtype=torch.float64, requires_grad=True))

    def run(x: Tensor, mask: Tensor | None = None) -> Tensor:
        return plain(x, mask, 0.7, softcap)

    def expected(x: Tensor, mask: Tensor | None = None) -> Tensor:
        return written_out(x, mask, 0.7, softcap)

    dy = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    assert_equal_in_float64([run(*inputs)], [expected(*inputs)])
    assert_equal_in_float64(
        torch.autograd.grad(run(*inputs), inputs, dy),
        torch.autograd.grad(expected(*inputs), inputs, dy),
    )


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_are_right_to_the_second_order(softcap: float) -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, mask: Tensor) -> Tensor:
        return plain(x, mask, 0.7, softcap)

    assert torch.autograd.gradcheck(run, (x, mask))
    assert torch.autograd.gradgradcheck(run, (x, mask))


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    data=st.data(),
    order=st.randoms(use_true_random=False),
)
def test_the_kernel_reads_any_mask_that_expands(
    shape: list[int], data: st.DataObject, order: Any
) -> None:
    kept = data.draw(st.integers(0, len(shape)))
    sizes = [size if data.draw(st.booleans()) else 1 for size in shape[len(shape) - kept :]]
    places = [*range(len(sizes))]
    order.shuffle(places)
    back = torch.tensor(places).argsort().tolist()
    mask = torch.randn([sizes[i] for i in places]).permute(back)
    x = torch.randn(shape)
    exact = written_out(x.double(), mask.double(), 1.0, 0.0)
    error = (interpreted(x, mask, 1.0, 0.0).double() - exact).norm()
    unit = torch.finfo(torch.float32).eps / 2 * exact.norm()
    assert error <= (written_out(x, mask, 1.0, 0.0).double() - exact).norm() + unit


@both
@pytest.mark.parametrize("width", [40, LONG])
def test_a_row_that_is_masked_whole_is_nan_and_the_others_are_not(run: Run, width: int) -> None:
    mask = torch.zeros(3, width)
    mask[1] = -torch.inf
    y = run(torch.randn(3, width), mask, 1.0, 0.0)
    assert y.isnan().all(1).tolist() == [False, True, False]
    assert y[[0, 2]].isfinite().all()


@both
@pytest.mark.parametrize("width", [40, LONG])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_makes_its_row_nan_as_in_torch(run: Run, width: int, bad: float) -> None:
    x = torch.randn(3, width)
    x[1, width // 2] = bad
    expected = torch.softmax(x, -1)
    torch.testing.assert_close(run(x, None, 1.0, 0.0), expected, equal_nan=True)
    assert expected[1].isnan().all()


@both
def test_a_block_that_is_masked_leaves_the_others_alone(run: Run) -> None:
    x = torch.randn(2, LONG)
    x[:, :9000] = -torch.inf  # the first block has 8192
    y = run(x, None, 1.0, 0.0)
    assert not y[:, :9000].any()
    torch.testing.assert_close(y[:, 9000:], torch.softmax(x[:, 9000:], -1))


@both
@pytest.mark.parametrize("width", [40, LONG])
def test_large_logits_and_the_smallest_finite_mask_neither_overflow_nor_vanish(
    run: Run, width: int
) -> None:
    x = torch.randn(4, width)
    x[0] *= 1e30
    x[1] -= 1e30
    mask = torch.zeros(4, width)
    mask[2] = mask[3, :5] = torch.finfo(torch.float32).min
    torch.testing.assert_close(run(x, mask, 1.0, 0.0), torch.softmax(x + mask, -1))


@both
def test_a_negative_scale_leaves_nothing_beyond_the_row(run: Run) -> None:
    x = torch.randn(3, 33)
    torch.testing.assert_close(run(x, None, -2.0, 0.0), torch.softmax(-2 * x, -1))


def test_a_mask_that_is_trained_has_a_gradient_of_its_dtype() -> None:
    x = torch.randn(2, 4, 6, 8).to(torch.bfloat16)
    bias = torch.randn(4, 6, 8, requires_grad=True)
    (mine,) = torch.autograd.grad(plain(x, bias, 1.0, 0.0).float().square().sum(), bias)
    (exact,) = torch.autograd.grad(
        written_out(x.double(), bias.double(), 1.0, 0.0).square().sum(), bias
    )
    assert mine.dtype == torch.float32
    assert (mine - exact).norm() < torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_result_is_saved_and_with_a_cap_the_input(softcap: float) -> None:
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    x, mask = torch.randn(4, 50, requires_grad=True), torch.randn(50)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = plain(x, mask, 0.5, softcap)
    due = {y.data_ptr(), x.data_ptr()} if softcap else {y.data_ptr()}
    assert {t.data_ptr() for t in saved} == due
    assert len(saved) == len(due)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: SOFTMAX(x, torch.ones(8, dtype=torch.bool), 1.0, 0.0), "torch.bool"),
        (lambda x: SOFTMAX(x, torch.ones(4), 1.0, 0.0), r"\(4,\) does not expand to \(2, 8\)"),
        (lambda x: SOFTMAX(x, torch.ones(1, 2, 8), 1.0, 0.0), "does not expand"),
        (lambda x: SOFTMAX(x[0, 0], None, 1.0, 0.0), "without dimensions"),
        (lambda x: SOFTMAX_BACKWARD(x, x, None, 1.0, 3.0), "softcap=3.0: the backward needs x"),
    ],
)
def test_other_masks_and_a_missing_input_are_errors(
    call: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        call(torch.randn(2, 8))


@both
def test_an_empty_tensor_has_an_empty_softmax(run: Run) -> None:
    assert run(torch.randn(0, 8), None, 1.0, 0.0).shape == (0, 8)
    assert run(torch.randn(3, 0), torch.randn(3, 1), 1.0, 0.0).shape == (3, 0)


def test_offsets_beyond_two_to_the_31st_reach_their_rows() -> None:
    stride = 2**31 + 8  # of virtual memory; only a few pages are touched
    for width in (40, LONG):
        x, mask = torch.randn(2, 2, width).to(torch.float16)
        far, apart = (
            torch.empty(stride + width, dtype=torch.float16).as_strided((2, width), (stride, 1))
            for _ in range(2)
        )
        far.copy_(x)
        apart.copy_(mask)
        y = interpreted(x, mask, 1.0, 2.0)
        assert torch.equal(interpreted(far, apart, 1.0, 2.0), y)
        dx = BACKWARD_SPEC.launch(x, y, x, 1.0, 2.0)
        assert torch.equal(BACKWARD_SPEC.launch(far, y, far, 1.0, 2.0)[0], dx[0])


def long_samples(dtype: torch.dtype) -> list[Any]:
    """The longest row on chip, and rows that are looped over, with all that a row may have."""
    mask = torch.randn(1, 131_072).to(dtype)
    mask[0, 50:90] = -torch.inf
    x = torch.randn(3, 131_072).to(dtype)
    return [
        (x[:, :ROW_ON_CHIP], mask[:, :ROW_ON_CHIP], 0.5, 3.0),
        (x[:2, : 3 * 8192], mask[:, : 3 * 8192], 0.5, 3.0),
        (x[:2], None, 1.0, 0.0),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(3))
def test_rows_of_up_to_128k_pass_the_gate_and_compile(number: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    from dataclasses import replace

    from bench.triton.ahead import TARGETS
    from bench.triton.gate import check_spec, compile_spec
    from bench.triton.interpreter import install

    install()
    x, mask, scale, softcap = long_samples(dtype)[number]
    spec = replace(SPEC, l2_share=2.5)  # a looped row's mask is read twice by each
    sample = x, mask, scale, softcap
    assert [*check_spec(spec, sample), *compile_spec(spec, sample, TARGETS)] == []
    y = plain(x, mask, scale, softcap)
    dy = torch.randn(x.shape).to(dtype)
    spec = replace(BACKWARD_SPEC, l2_share=7 / 4)
    args = dy, y, x if softcap else None, scale, softcap
    assert [*check_spec(spec, args), *compile_spec(spec, args, TARGETS)] == []


def test_a_row_on_chip_is_read_once() -> None:
    pytest.importorskip("triton")
    from bench.triton.gate import Traffic, check
    from bench.triton.interpreter import install

    install()
    x = torch.randn(16, 4096)
    args = x, None, 0.5, 2.0
    exact = SPEC.plain(*doubles([x]), *args[1:])
    once = Traffic(dram_bytes=2 * x.nbytes, l2_bytes=2 * x.nbytes)
    assert check(lambda: SPEC.launch(*args), exact, SPEC.plain(*args), once) == []
    y = plain(*args)
    back = torch.randn_like(x), y, x, 0.5, 2.0
    exact = BACKWARD_SPEC.plain(*doubles(back[:3]), *back[3:])
    once = Traffic(dram_bytes=4 * x.nbytes, l2_bytes=4 * x.nbytes)
    launched = BACKWARD_SPEC.launch
    assert check(lambda: launched(*back), exact, BACKWARD_SPEC.plain(*back), once) == []


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", [(16, 1024), (40, 333), (4, ROW_ON_CHIP), (2, 20000)])
def test_it_moves_no_more_bytes_than_liger_kernel(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    liger = pytest.importorskip("liger_kernel.ops.softmax")
    from bench.triton.interpreter import install
    from bench.triton.trace import trace

    install()
    x, dy = torch.randn(2, *shape).to(dtype)
    with trace() as theirs:
        y, *settings_ = liger._softmax_forward(x)
        liger._softmax_backward(dy, y, *settings_)
    with trace() as mine:
        SPEC.launch(x, None, 1.0, 0.0)
        BACKWARD_SPEC.launch(dy, y, None, 1.0, 0.0)
    assert len(theirs) == len(mine) == 2
    for own, other in zip(mine, theirs, strict=True):
        assert own.dram_bytes <= other.dram_bytes


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_formulas_of_scratch_hold(dtype: torch.dtype, softcap: float) -> None:
    x, mask = torch.randn(256, 1024).to(dtype), torch.randn(1024).to(dtype)
    assert_scratch_is_stated(SPEC, x, mask, 0.5, softcap)
    assert_scratch_is_stated(BACKWARD_SPEC, x, x, x if softcap else None, 0.5, softcap)
