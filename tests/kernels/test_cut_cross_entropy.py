"""Cross-entropy without logits in memory: numbers, order, bounds, bytes and wiring."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.meter import Meter
from bench.triton.ahead import TARGETS, Target, compile_for
from bench.triton.gate import Traffic, check
from bench.triton.interpreter import install
from bench.triton.trace import trace
from memopt._torch import FakeTensorMode
from memopt.errors import ConfigError
from memopt.kernels import cut_cross_entropy as cut
from memopt.kernels import cut_launches, head, linear_cross_entropy, triton_cut
from memopt.kernels.cut_launches import TILES, Tiles
from memopt.kernels.head import Head, run_chunks
from memopt.kernels.linear_cross_entropy import Arguments
from memopt.kernels.rows import IndexTargets
from tests.idle_kernels import IdleKernels
from tests.references import LOW_PRECISION, assert_draws_within_reference_error

install()
Tensor = torch.Tensor
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True, "smoothing": 0.2},
    {"smoothing": 1.0},
    {"weighted": True},
    {"bias": True, "weighted": True, "smoothing": 0.2, "scale": -1.5},
    {"bias": True, "scale": 0.3, "softcap": 2.0},
    {"weighted": True, "smoothing": 0.1, "softcap": 5.0, "normaliser": True},
    {"trained": False, "weighted": True, "smoothing": 0.1, "softcap": 5.0},
]
# Every option at once, with rows that do not count.
FULL: dict[str, Any] = {
    "bias": True,
    "weighted": True,
    "smoothing": 0.1,
    "softcap": 5.0,
    "normaliser": True,
}


@dataclass(frozen=True)
class Case:
    """A head, its targets and what comes from above."""

    layer: Head
    loss: IndexTargets
    g: Tensor | None
    h: Tensor | None
    wanted: tuple[bool, bool, bool]

    @classmethod
    def draw(
        cls,
        rows: int = 100,
        width: int = 48,
        classes: int = 200,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        bias: bool = False,
        weighted: bool = False,
        smoothing: float = 0.0,
        normaliser: bool = False,
        trained: bool = True,
        **factors: float,
    ) -> "Case":
        x = torch.randn(rows, width, device=device).to(dtype)
        weight = (0.3 * torch.randn(classes, width, device=device)).to(dtype)
        layer = Head(
            x, weight, torch.randn(classes, device=device).to(dtype) if bias else None, **factors
        )
        target = torch.randint(classes, (rows,), device=device)
        class_weight = torch.rand(classes, device=device) if weighted else None
        g, h = (torch.randn(rows, device=device) if on else None for on in (trained, normaliser))
        if g is not None:
            g[::5] = 0
        loss = IndexTargets(target, class_weight, smoothing)
        return cls(layer, loss, g, h, (trained, trained, trained and bias))

    @property
    def double(self) -> "Case":
        x, weight, bias, class_weight, g, h = (
            None if t is None else t.double()
            for t in (
                self.layer.x_NH, self.layer.weight_VH, self.layer.bias_V, self.loss.weight_V,
                self.g, self.h,
            )
        )  # fmt: skip
        assert x is not None
        assert weight is not None
        layer = replace(self.layer, x_NH=x, weight_VH=weight, bias_V=bias)
        return replace(self, layer=layer, loss=replace(self.loss, weight_V=class_weight), g=g, h=h)

    def cut(self, **options: Any) -> list[Tensor]:
        """Values, log-sum-exps and gradients by tiles."""
        return self._flat(cut.run(self.layer, self.loss, self.wanted, self.g, self.h, **options))

    def chunked(self) -> list[Tensor]:
        """The same by chunks, in eager code."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "has_row_kernel", lambda loss, x: False)
            return self._flat(run_chunks(self.layer, self.loss, 64, self.wanted, self.g, self.h))

    def _flat(self, results: tuple[Tensor, Tensor, Sequence[Tensor]]) -> list[Tensor]:
        values, lse, gradients = results
        made = [g for g, on in zip(gradients, self.wanted, strict=True) if on]
        assert all(not g.numel() for g, on in zip(gradients, self.wanted, strict=True) if not on)
        return [values, lse, *made]


def assert_near_float64(draw: Callable[[], Case], draws: int = 3, **options: Any) -> None:
    def results() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        case = draw()
        return case.cut(**options), case.double.chunked(), case.chunked()

    assert_draws_within_reference_error(results, draws)


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def memory_of_nan() -> Any:
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators may be cut on the CPU too, where kernels are interpreted."""
    monkeypatch.setattr(cut, "serves", lambda a: not a.target.is_floating_point())


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


def peaked(dtype: torch.dtype = torch.bfloat16) -> Case:
    """Half of the predictions are right and sure, as most of a trained model's are."""
    case = Case.draw(256, 64, 512, dtype=dtype)
    target = torch.arange(256)
    x = 2 * case.layer.weight_VH[target].float()
    x[:128] = torch.randn(128, 64)
    layer = replace(case.layer, x_NH=x.to(dtype), scale=2.0)
    return replace(case, layer=layer, loss=replace(case.loss, target_N=target))


def test_nothing_is_skipped_unless_that_is_asked_for() -> None:
    assert inspect.signature(cut.run).parameters["skip_below"].default == 0.0
    case = Case.draw(**FULL)
    assert_same_bits(case.cut(), case.cut(skip_below=2.0**-126))


def test_skipping_is_off_by_no_more_than_what_is_skipped_and_saves_reading(
    record_property: Callable[[str, object], None],
) -> None:
    case, threshold = peaked(), 2**-12
    with trace() as exact_launches:
        exact = case.cut()
    with trace() as launches:
        actual = case.cut(skip_below=threshold)
    assert_same_bits(actual[:2], exact[:2])
    assert case.g is not None
    x, weight = case.layer.x_NH.float(), case.layer.weight_VH.float()
    each = threshold * abs(case.layer.scale)
    unit = torch.finfo(torch.bfloat16).eps
    of_x = each * case.g.abs() * weight.norm(dim=1).sum()
    of_weight = each * (case.g.abs() * x.norm(dim=1)).sum()
    off = [(a - e).float().norm(dim=1) for a, e in zip(actual[2:], exact[2:], strict=True)]
    assert (off[0] <= of_x + unit * exact[2].float().norm(dim=1)).all()
    assert (off[1] <= of_weight + unit * exact[3].float().norm(dim=1)).all()
    assert any(error.any() for error in off)
    share = [float(o.norm() / e.float().norm()) for o, e in zip(off, exact[2:], strict=True)]
    record_property("relative error of the gradients", share)
    moved, all_moved = (
        sum(a.l2_bytes for a in one if a.kernel == "product_kernel")
        for one in (launches, exact_launches)
    )
    assert moved < all_moved


def test_tiles_of_rows_that_do_not_count_are_skipped_without_an_error() -> None:
    case = Case.draw(256, 16, 256)
    assert case.g is not None
    case.g[:128] = 0
    assert_same_bits(case.cut(), case.cut(skip_below=2.0**-126))


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


def arguments(case: Case, **changes: Any) -> Arguments:
    layer = case.layer
    made = Arguments(
        layer.x_NH, layer.weight_VH, layer.bias_V, case.loss.target_N, case.loss.weight_V, -100,
        case.loss.smoothing, layer.scale, layer.softcap, 0, case.wanted,
    )  # fmt: skip
    return made._replace(**changes)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_the_operators_give_what_chunks_give(served: None, dtype: torch.dtype) -> None:
    case = Case.draw(60, 32, 300, dtype=dtype, **FULL)
    case.loss.target_N[::7] = -100
    g, h = torch.randn(60), torch.randn(60)

    def results(chunk_rows: int) -> list[Tensor]:
        a = arguments(case, chunk_rows=chunk_rows)
        return [
            *linear_cross_entropy.REDUCED(*a, True),
            *linear_cross_entropy.ROWS(*a),
            *linear_cross_entropy.ROWS_BACKWARD(*a, g, h),
        ]

    for mine, plain in zip(results(0), results(16), strict=True):
        assert mine.dtype == plain.dtype
        close = 4 * torch.finfo(dtype).eps * plain.float().abs().max().item()
        torch.testing.assert_close(mine, plain, rtol=0, atol=close)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [((200, 64, 520), {}), ((40, 32, 5000), FULL), ((2500, 8, 300), {"smoothing": 0.1})],
    ids=str,
)
def test_what_it_allocates_is_what_the_formula_says(
    served: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(cut_launches, "kernels", IdleKernels())
    case = Case.draw(*shape, dtype=dtype, **options)
    a, g = arguments(case), torch.randn(shape[0])
    frozen = a._replace(wanted=(False,) * 3)
    for operator, args in (
        (linear_cross_entropy.REDUCED, (*a, True)),
        (linear_cross_entropy.REDUCED, (*frozen, True)),
        (linear_cross_entropy.ROWS, a),
        (linear_cross_entropy.ROWS_BACKWARD, (*a, g, g)),
    ):
        with Meter("cpu") as meter:
            result = operator(*args)
        measured = meter.peak_bytes - meter.end_bytes
        assert abs(linear_cross_entropy.scratch_bytes(*args) - measured) <= 16  # single numbers
        del result


def test_scratch_grows_with_neither_rows_nor_classes_but_for_a_few_numbers_a_row() -> None:
    small, large = (
        cut.scratch_bytes(rows, 4096, classes, torch.bfloat16, (True, True, False), False)
        for rows, classes in ((4096, 32_000), (65_536, 256_000))
    )
    assert small == large == 2048 * 2048 * 2 + 2048 * 4096 * 4


def test_zero_rows_of_a_chunk_are_refused_where_logits_are_needed() -> None:
    case = Case.draw(4, 16, 8)
    with pytest.raises(ConfigError, match=r"chunk_rows=0.*cpu.*give a number of rows"):
        linear_cross_entropy.REDUCED(*arguments(case), True)


@pytest.mark.parametrize(
    ("dtype", "target", "capability", "expected"),
    [
        (torch.bfloat16, torch.int64, (9, 0), True),
        (torch.float32, torch.int64, (8, 0), True),
        (torch.float64, torch.int64, (9, 0), False),
        (torch.bfloat16, torch.float32, (9, 0), False),
        (torch.bfloat16, torch.int64, (7, 5), False),
    ],
)
def test_it_serves_where_it_can(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    target: torch.dtype,
    capability: tuple[int, int],
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    a = arguments(Case.draw(4, 16, 8))
    assert not cut.serves(a)
    with FakeTensorMode():
        x = torch.empty(4, 16, dtype=dtype, device="cuda")
        y = torch.empty((4, 8) if target.is_floating_point else (4,), dtype=target, device="cuda")
    assert cut.serves(a._replace(x=x, target=y)) is expected


BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64
# A head of a usual size, and one of whose strides nothing is known.
EVEN, ODD = (8192, 4096, 128_256), (8191, 4095, 128_255)


def logits_arguments(dtype: torch.dtype, shape: tuple[int, int, int], tiles: Tiles) -> Any:
    rows, width, classes = shape
    return {
        "x": dtype, "weight": dtype, "bias": dtype, "target": I64, "class_weight": F32,
        "lse": F32, "N": rows, "V": classes, "H": width, "x_row": width, "x_col": 1,
        "w_row": width, "w_col": 1, "factor": 0.5, "softcap": 30.0, "CAPPED": True,
        "EVEN": width % tiles.step == 0, "ROWS": tiles.rows, "CLASSES": tiles.columns,
        **tiles.options,
    }  # fmt: skip


def forward_build(
    dtype: torch.dtype, shape: tuple[int, int, int], tiles: Tiles, *, smoothed: bool
) -> Any:
    columns = cut_launches.forward_columns(tiles, smoothed=smoothed)
    return triton_cut.log_sum_exps_kernel, {
        **logits_arguments(dtype, shape, tiles), "picked": F32,
        "spread": F32 if smoothed else None, "TURNS": cut.PART // columns, "CLASSES": columns,
    }  # fmt: skip


def gradient_build(dtype: torch.dtype, shape: tuple[int, int, int], tiles: Tiles) -> Any:
    shared = logits_arguments(dtype, shape, tiles)
    return triton_cut.gradient_kernel, {
        **shared, "weight_sum": F32, "g": F32, "h": F32, "block": dtype, "alive": torch.int32,
        "N": cut.BLOCK, "V": cut.BLOCK, "scale": 0.5, "smoothing": 0.1, "skip_below": 0.1,
        "first_class": 0, "all_classes": shape[2], "stride": cut.BLOCK, "alive_row": 64,
        "SMOOTHED": True, "SKIPS": True,
    }  # fmt: skip


def product_build(
    dtype: torch.dtype, shape: tuple[int, int, int], tiles: Tiles, *, flipped: bool = False
) -> Any:
    width = shape[1]
    tile = (tiles.columns, tiles.rows) if flipped else (tiles.rows, tiles.columns)
    strides = (1, cut.BLOCK) if flipped else (cut.BLOCK, 1)
    return triton_cut.product_kernel, {
        "block": dtype, "operand": dtype, "wide": F32, "result": dtype, "alive": None,
        "M": cut.BLOCK, "K": cut.BLOCK, "H": width, "block_row": strides[0],
        "block_col": strides[1], "o_row": width, "o_col": 1, "wide_row": width,
        "result_row": width, "alive_row": 0, "alive_col": 0, "old": cut.BLOCK, "kept": 0,
        "SKIPS": False, "ROWS": tile[0], "COLUMNS": tile[1], **tiles.options,
    }  # fmt: skip


BUILDS: dict[str, Callable[..., Any]] = {
    "forward": functools.partial(forward_build, smoothed=False),
    "smoothed forward": functools.partial(forward_build, smoothed=True),
    "gradient": gradient_build,
    "hidden states": product_build,
    "weight": functools.partial(product_build, flipped=True),
}


def assert_compiles(name: str, build: str, target: Target) -> None:
    dtype, shape = BF16 if "half" in name else F32, ODD if "ragged" in name else EVEN
    tiles = TILES[name] if isinstance(target, int) else replace(TILES[name], stages=2)
    kernel, arguments = BUILDS[build](dtype, shape, tiles)
    report = compile_for(kernel, arguments, target)
    assert report.problems() == []
    exact_on_nvidia = name.endswith("float32") and isinstance(target, int)
    assert bool(report.matrix_products) is not exact_on_nvidia
    assert report.vector_loads or "ragged" in name


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_without_spills_to_products_of_the_tensor_cores(
    build: str, target: Target
) -> None:
    assert_compiles("half", build, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TILES if name != "half"])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("target", TARGETS)
def test_all_other_ways_to_cut_compile_without_spills(
    name: str, build: str, target: Target
) -> None:
    assert_compiles(name, build, target)


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_compiled_it_allocates_what_the_formula_says(dtype: torch.dtype) -> None:
    case = Case.draw(8192, 1024, 50_304, dtype=dtype, device="cuda")
    args = (*arguments(case), True)
    linear_cross_entropy.REDUCED(*args)
    with Meter("cuda") as meter:
        result = linear_cross_entropy.REDUCED(*args)
    measured = meter.peak_bytes - meter.end_bytes
    assert abs(linear_cross_entropy.scratch_bytes(*args) - measured) <= 2**16  # rounded to blocks
    del result
