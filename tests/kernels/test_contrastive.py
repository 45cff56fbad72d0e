"""The chunked contrastive loss against the whole matrix of similarities."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from bench.meter import Meter
from memopt.errors import DoubleBackwardError
from memopt.kernels import scratch_table
from memopt.kernels.contrastive import Arguments, scratch_bytes
from tests import references
from tests.references import (
    LOW_PRECISION,
    Draw,
    assert_equal_in_float64,
    assert_near_float64,
    assert_same_bits,
    run,
)
from tests.scratch import scratch_of

Tensor = torch.Tensor
BOTH = pytest.mark.parametrize("both", [True, False], ids=["both directions", "one direction"])


def mine(both: bool, chunk_rows: int = 5) -> Callable[..., Tensor]:
    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        a = arguments(x, y, scale, both, chunk_rows)
        result: Tensor = torch.ops.memopt.contrastive(*a)[0]
        return result

    return loss


def arguments(x: Tensor, y: Tensor, scale: Tensor, both: bool, chunk_rows: int = 5) -> Arguments:
    wanted = [t.requires_grad for t in (x, y, scale)]
    return Arguments(x, y, scale, chunk_rows, wanted, both)


def plain(both: bool) -> Callable[..., Tensor]:
    return lambda x, y, scale: references.contrastive(x, y, scale, both=both)


def pairs(
    rows: int = 23,
    others: int | None = None,
    size: int = 6,
    *,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Normalised embeddings, as a contrastive loss gets them."""
    x, y = torch.randn(rows, size), torch.randn(rows if others is None else others, size)
    x, y = F.normalize(x, dim=1).to(dtype), F.normalize(y, dim=1).to(dtype)
    return [x, y, torch.tensor(scale, dtype=dtype)]


@BOTH
@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 100])
@pytest.mark.parametrize("scale", [1.0, -2.5, 100.0, 0.0])
def test_float64_gives_the_numbers_of_the_whole_matrix(
    both: bool, chunk_rows: int, scale: float
) -> None:
    inputs = pairs(scale=scale)
    expected = run(plain(both), inputs, 0.37)
    assert_equal_in_float64(run(mine(both, chunk_rows), inputs, 0.37), expected)


@given(
    rows=st.integers(1, 30),
    extra=st.integers(0, 9),
    size=st.integers(1, 9),
    chunk_rows=st.integers(1, 40),
    both=st.booleans(),
    spread=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_any_size_gives_the_numbers_of_the_whole_matrix(
    rows: int, extra: int, size: int, chunk_rows: int, both: bool, spread: float
) -> None:
    x, y, scale = pairs(rows, rows if both else rows + extra, size)
    inputs = [x * spread, y, scale]
    assert_equal_in_float64(run(mine(both, chunk_rows), inputs), run(plain(both), inputs))


def test_rows_and_columns_of_very_different_size_stay_exact() -> None:
    x, y, scale = pairs(scale=1.0)
    inputs = [x * torch.logspace(-3, 3, len(x), dtype=torch.float64)[:, None], y, scale]
    assert_equal_in_float64(run(mine(True), inputs), run(plain(True), inputs))


@BOTH
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("factor", [1.0, 65536.0])
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_low_precision_is_as_near_to_float64_as_eager_is(
    both: bool, dtype: torch.dtype, factor: float, scale: float
) -> None:
    def draw() -> Draw:
        return mine(both, 32), plain(both), pairs(192, size=32, scale=scale, dtype=dtype)

    assert_near_float64(draw, factor)


@BOTH
@pytest.mark.parametrize(
    "trained",
    [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)][1:],
    ids=str,
)
def test_each_input_gets_its_gradient_while_others_are_frozen(
    both: bool, trained: tuple[bool, ...]
) -> None:
    inputs = pairs()
    actual = run(mine(both), inputs, 2.0, trained)
    assert len(actual) == 1 + sum(trained)
    assert_equal_in_float64(actual, run(plain(both), inputs, 2.0, trained))


@BOTH
def test_a_scale_in_float32_goes_with_embeddings_in_bfloat16(both: bool) -> None:
    x, y, _ = pairs(dtype=torch.bfloat16)
    scale = torch.tensor(3.0)
    loss, *gradients = run(mine(both), [x, y, scale])
    assert [loss.dtype, *(g.dtype for g in gradients)] == [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    ]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_bit_by_bit(both: bool, dtype: torch.dtype) -> None:
    inputs = pairs(200, size=32, dtype=dtype)
    assert_same_bits(*(run(mine(both, 7), inputs) for _ in range(2)))


@BOTH
def test_a_kept_graph_gives_the_same_gradients_twice(both: bool) -> None:
    x, y, scale = pairs()
    loss = mine(both)(x.requires_grad_(), y, scale)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused() -> None:
    x, y, scale = pairs()
    loss = mine(True)(x.requires_grad_(), y, scale)
    with pytest.raises(DoubleBackwardError, match="second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@BOTH
def test_the_matrix_never_exists(both: bool) -> None:
    inputs = pairs(1024, size=16, dtype=torch.float32)
    with Meter() as meter:
        run(mine(both, 16), inputs)
    assert meter.peak_bytes < 1024 * 1024 * 4 / 8


@BOTH
def test_memory_grows_with_the_number_of_pairs_and_not_with_its_square(both: bool) -> None:
    peaks = []
    for rows in (512, 1024, 2048):
        inputs = pairs(rows, size=16, dtype=torch.float32)
        with Meter() as meter:
            run(mine(both, 16), inputs)
        peaks.append(meter.peak_bytes)
    assert peaks[2] - peaks[1] < 2.2 * (peaks[1] - peaks[0])


@BOTH
def test_without_gradients_no_buffer_is_made_for_them(both: bool) -> None:
    x, y, scale = pairs(512, size=256, dtype=torch.float32)
    with Meter() as meter:
        mine(both, 8)(x, y, scale)
    assert meter.peak_bytes < x.nbytes / 2
    x.requires_grad_()
    with Meter() as meter:
        mine(both, 8)(x, y, scale)
    assert x.nbytes < meter.peak_bytes < 1.5 * x.nbytes


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [(True, True, True), (False, True, False)], ids=str)
def test_torch_finds_the_operator_in_order(
    both: bool, dtype: torch.dtype, trained: tuple[bool, ...]
) -> None:
    x, y, scale = (t.requires_grad_(on) for t, on in zip(pairs(dtype=dtype), trained, strict=True))
    a = arguments(x, y, scale, both)
    torch.library.opcheck(torch.ops.memopt.contrastive.default, a)


@BOTH
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        *(((300, 300, 64, 100), dtype) for dtype in (torch.float64, *LOW_PRECISION)),
        *(((1500, 1500, 8, 1500), dtype) for dtype in (torch.float32, torch.bfloat16)),
        ((50, 4000, 16, 9), torch.float32),
    ],
    ids=str,
)
def test_what_it_allocates_is_what_the_formula_says(
    both: bool, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    rows, others, size, chunk_rows = sizes
    x, y, scale = pairs(rows, rows if both else others, size, dtype=dtype)
    z = x.new_empty(min(rows, chunk_rows), len(y))
    own = x[: len(z)]
    library = 0
    if dtype.itemsize == 2:  # whose operands some libraries lay out anew inside of each product
        library = max(
            scratch_of(lambda: torch.mm(own, y.t(), out=z)),
            scratch_of(lambda: torch.mm(z, y)),
            scratch_of(lambda: torch.mm(z.t(), own)),
        )
    for trained in [(0, 0, 0), (1, 1, 1), (0, 0, 1)]:
        a = Arguments(x, y, scale, chunk_rows, [bool(on) for on in trained], both)
        beside = scratch_of(partial(torch.ops.memopt.contrastive, *a)) - scratch_bytes(*a)
        assert -4096 <= beside <= library + 4096, trained


def test_the_planner_knows_the_formula() -> None:
    assert scratch_table()["memopt.contrastive"] is scratch_bytes


@pytest.mark.gpu
@BOTH
def test_cuda_gives_the_numbers_of_the_whole_matrix(both: bool) -> None:
    inputs = [t.cuda() for t in pairs(3000, size=32)]
    assert_equal_in_float64(run(mine(both, 256), inputs), run(plain(both), inputs))
