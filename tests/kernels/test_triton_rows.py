"""The row kernel against the eager rows that it replaces on a GPU, and against float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

pytest.importorskip("triton")

from bench.meter import Meter
from bench.triton.ahead import TARGETS, Target
from bench.triton.gate import Build, Traffic, check, code
from bench.triton.interpreter import install
from memopt._torch import FakeTensorMode
from memopt.kernels import head, linear_cross_entropy, triton_rows
from memopt.kernels.head import Head, run_rows
from memopt.kernels.rows import IndexTargets, RowLoss, SoftTargets
from tests.references import (
    LOW_PRECISION,
    assert_draws_within_reference_error,
    assert_within_reference_error,
)

install()
Tensor = torch.Tensor
OPTIONS: list[dict[str, Any]] = [
    {},
    {"smoothing": 0.2},
    {"smoothing": 1.0},
    {"weighted": True},
    {"weighted": True, "smoothing": 0.2},
    {"scale": 0.3, "softcap": 2.0},
    {"scale": -1.5, "weighted": True, "normaliser": True},
    {"softcap": 5.0, "weighted": True, "smoothing": 0.1, "normaliser": True},
    {"trained": False},
    {"trained": False, "weighted": True, "smoothing": 0.1, "softcap": 5.0},
]


@dataclass(frozen=True)
class Rows:
    """Products of a chunk, and what becomes of them."""

    raw: Tensor
    loss: IndexTargets
    scale: float = 1.0
    softcap: float = 0.0
    g: Tensor | None = None
    h: Tensor | None = None

    @classmethod
    def draw(
        cls,
        rows: int = 16,
        classes: int = 1031,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        weighted: bool = False,
        smoothing: float = 0.0,
        trained: bool = True,
        normaliser: bool = False,
        **options: Any,
    ) -> "Rows":
        weight = torch.rand(classes, device=device) if weighted else None
        target = torch.randint(classes, (rows,), device=device)
        g, h = (torch.randn(rows, device=device) if on else None for on in (trained, normaliser))
        raw = (3 * torch.randn(rows, classes, device=device)).to(dtype)
        return cls(raw, IndexTargets(target, weight, smoothing), g=g, h=h, **options)

    @property
    def double(self) -> "Rows":
        weight = self.loss.weight_V
        loss = replace(self.loss, weight_V=None if weight is None else weight.double())
        g, h = (None if t is None else t.double() for t in (self.g, self.h))
        return replace(self, raw=self.raw.double(), loss=loss, g=g, h=h)

    def kernel(self) -> list[Tensor]:
        """Values, log-sum-exps and, where there is an upstream one, gradients."""
        raw = self.raw.clone()
        result = triton_rows.run(raw, self.loss, self.scale, self.softcap, self.g, self.h)
        return [*result, raw] if self.g is not None else [*result]

    def eager(self) -> list[Tensor]:
        raw = self.raw.clone()
        layer = Head(raw, raw, None, self.scale, self.softcap)
        every = slice(0, len(raw))
        result = _eager_rows(layer, self.loss, raw, every, self.g, self.h)
        return [*result, raw] if self.g is not None else [*result]


def _eager_rows(*arguments: Any) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "has_row_kernel", lambda loss, x: False)
        return run_rows(*arguments)


@pytest.fixture
def row_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs on the CPU too, where it is interpreted."""
    for module in (head, linear_cross_entropy):
        monkeypatch.setattr(module, "has_row_kernel", lambda loss, x: loss is IndexTargets)


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
    expanded = replace(rows, g=torch.ones(1).expand(6), h=torch.randn(12)[::2])
    dense = replace(rows, g=torch.ones(6), h=expanded.h.clone())  # type: ignore[union-attr]
    assert torch.equal(expanded.kernel()[2], dense.kernel()[2])


def test_offsets_beyond_two_to_the_31st_reach_their_rows() -> None:
    stride = 2**31 + 8  # of virtual memory; only a few pages are touched
    rows = Rows.draw(2, 40, dtype=torch.float16)
    far = torch.empty(stride + 40, dtype=torch.float16).as_strided((2, 40), (stride, 1))
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


@pytest.mark.parametrize("rows", [slice(2, 7), torch.tensor([0, 3, 4, 9])], ids=["slice", "list"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_rows_of_a_head_go_through_it(
    row_kernel: None, rows: slice | Tensor, trained: bool
) -> None:
    whole = Rows.draw(10, 300, weighted=True, normaliser=True, scale=0.5, softcap=4.0)
    layer = Head(whole.raw, whole.raw, None, whole.scale, whole.softcap)
    upstream = (whole.g, whole.h) if trained else (None, None)
    mine, plain = whole.raw[rows].clone(), whole.raw[rows].clone()
    actual = run_rows(layer, whole.loss, mine, rows, *upstream)
    expected = _eager_rows(layer, whole.loss, plain, rows, *upstream)
    torch.testing.assert_close(actual, expected)
    if trained:
        torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_give_the_same_with_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    x, w = torch.randn(40, 32).to(dtype), torch.randn(300, 32).to(dtype)
    target = torch.randint(300, (40,))
    target[::7] = -100
    shared = (x, w, None, target, torch.rand(300), -100, 0.1, 0.5, 4.0, 16)
    g, h = torch.randn(40), torch.randn(40)

    def results() -> list[Tensor]:
        return [
            *linear_cross_entropy.REDUCED(*shared, [True, True, False], True),
            *linear_cross_entropy.ROWS(*shared, [False] * 3),
            *linear_cross_entropy.ROWS_BACKWARD(*shared, [True, True, False], g, h),
        ]

    expected = results()
    kernel = Mock(side_effect=triton_rows.run)
    monkeypatch.setattr(head, "has_row_kernel", lambda loss, x: loss is IndexTargets)
    monkeypatch.setattr(triton_rows, "run", kernel)
    for mine, plain in zip(results(), expected, strict=True):
        torch.testing.assert_close(mine, plain)
    assert kernel.call_count == 9  # three chunks each; the reduced one leaves ignored rows out


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [  # in bfloat16 only with a sum in float32, as oneDNN's scratch is more than what is left here
        (torch.float32, (64, 32, 2000, 16)),
        (torch.float32, (72, 64, 8000, 8)),
        (torch.bfloat16, (72, 64, 8000, 8)),
    ],
)
@pytest.mark.parametrize("options", [(0.0, 0.0, False), (5.0, 0.1, True)])
def test_what_it_allocates_is_what_the_formula_says(
    row_kernel: None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    options: tuple[float, float, bool],
) -> None:
    rows, width, classes, chunk_rows = shape
    softcap, smoothing, weighted = options
    x, w = torch.randn(rows, width, dtype=dtype), torch.randn(classes, width, dtype=dtype)
    target = torch.randint(0, classes, (rows,))
    weight = torch.rand(classes) if weighted else None
    wanted = [True, True, False]
    args = (x, w, None, target, weight, -100, smoothing, 1.0, softcap, chunk_rows, wanted, True)
    linear_cross_entropy.REDUCED(*args)
    with Meter("cpu") as meter:
        result = linear_cross_entropy.REDUCED(*args)
    measured = meter.peak_bytes - meter.end_bytes
    formula = linear_cross_entropy.scratch_bytes(*args)
    assert abs(formula - measured) <= measured // 100 + 4096
    del result


@pytest.mark.parametrize(
    ("loss", "dtype", "capability", "installed", "expected"),
    [
        (IndexTargets, torch.bfloat16, (9, 0), True, True),
        (IndexTargets, torch.float32, (8, 0), True, True),
        (IndexTargets, torch.float64, (9, 0), True, False),
        (SoftTargets, torch.bfloat16, (9, 0), True, False),
        (IndexTargets, torch.bfloat16, (7, 5), True, False),
        (IndexTargets, torch.bfloat16, (9, 0), False, False),
    ],
)
def test_it_runs_where_it_can(
    monkeypatch: pytest.MonkeyPatch,
    loss: type[RowLoss],
    dtype: torch.dtype,
    capability: tuple[int, int],
    installed: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(head, "_triton_is_installed", lambda: installed)
    with FakeTensorMode():
        x = torch.empty(1, dtype=dtype, device="cuda")
    assert head.has_row_kernel(loss, x) is expected
    assert not head.has_row_kernel(loss, torch.empty(1, dtype=dtype))
