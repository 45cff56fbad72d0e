"""Generated kernels pass the gate that written ones pass, also where no other compiler has one."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

pytest.importorskip("triton")

from bench.triton.ahead import TARGETS
from bench.triton.gate import Build, check_spec, code, for_target, uninitialised_is_nan
from bench.triton.interpreter import install
from bench.triton.trace import trace
from memopt.device import DEVICES
from memopt.kernels.region import launch
from memopt.kernels.spec import KernelSpec
from memopt.rows.lowering import LoweredRows, lower_rows
from memopt.rows.select import choose_regions
from tests.references import LOW_PRECISION
from tests.row_functions import (
    DROPPED,
    Function,
    add_norm_quantise,
    dropout,
    dropout_backward,
    lowered,
    mask_of,
    quantise_groups,
    read,
    returned,
    swiglu_backward,
    traced,
    traced_for_any_rows,
)

install()


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


def norm_inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, ...]:
    return draw(dtype, *shape), draw(dtype, *shape), draw(dtype, shape[-1])


def glu_inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, ...]:
    return tuple(draw(dtype, *shape) for _ in range(3))


def backward_inputs(dtype: torch.dtype, *shape: int) -> tuple[Tensor, ...]:
    packed = torch.randint(256, (*shape[:-1], shape[-1] // 8), dtype=torch.uint8)
    return draw(dtype, *shape), packed


def one_input(dtype: torch.dtype, *shape: int) -> tuple[Tensor, ...]:
    return (draw(dtype, *shape),)


CASES: dict[str, tuple[Function, Any]] = {
    f.__name__: (f, inputs)
    for f, inputs in (
        (add_norm_quantise, norm_inputs),
        (swiglu_backward, glu_inputs),
        (dropout_backward, backward_inputs),
        (quantise_groups, one_input),
    )
}
SHAPES = [(4, 32, 1024), (64, 768), (7, 3, 96)]
cases = pytest.mark.parametrize(("function", "inputs"), CASES.values(), ids=CASES)


def specs_of(function: Function, sample: Sequence[Tensor]) -> list[KernelSpec]:
    """A generated kernel in every tiling, as one that states what it does."""
    region = lowered(function, sample)
    return [
        spec_of(function, replace(region, tiling=n), sample) for n in range(len(region.tilings))
    ]


def spec_of(function: Function, region: LoweredRows, sample: Sequence[Tensor]) -> KernelSpec:
    """One of them; its reference is the function."""

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        return returned(region, launch(read(region, args), region.kernel, region.tiling))

    def samples(dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
        yield tuple(sample)

    return KernelSpec(
        name="memopt::region",
        plain=function,
        launch=run,
        scratch=lambda *_: 0,
        samples=samples,
        l2_share=1.5,
        source="memopt",
    )


@cases
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_every_tiling_is_right_and_moves_what_it_must(
    function: Function, inputs: Any, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    sample = inputs(dtype, *shape)
    for spec in specs_of(function, sample):
        assert check_spec(spec, sample) == []


@cases
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_tiling_compiles_well(
    function: Function, inputs: Any, target: Any, dtype: torch.dtype
) -> None:
    sample = inputs(dtype, 64, 4096)
    assert problems(function, sample, target) == []


DEVICE_OF = {80: "a100", 90: "h200", 100: "b200", "gfx942": "mi300x"}


def problems(function: Function, sample: Sequence[Any], target: Any) -> list[str]:
    """What the compiler makes of a function's kernel that is not as it should be."""
    region = lowered(function, sample, device=DEVICES[DEVICE_OF[target]])
    found = []
    for tiling in range(len(region.tilings)):
        with trace() as launches:
            launch(read(region, sample), region.kernel, tiling)
        (done,) = launches
        arguments = for_target(target, done.arguments)
        build = Build(kernel=done.kernel, arguments=arguments, options={})
        found += [f"{region.tilings[tiling]}: {problem}" for problem in code(build, [target])]
    return found


def bfloat16(*shape: int) -> Tensor:
    return draw(torch.bfloat16, *shape)


def test_bits_are_the_mask_that_dropout_used_whatever_the_tiling() -> None:
    """The interpreter draws as a GPU does; PyTorch on the CPU does not, so bits are the truth."""
    x, seeds = draw(torch.float32, 5, 7, 320), torch.tensor([1, 2**40 + 5, 3])
    region = lowered(dropout, (x, seeds))
    with trace() as launches, uninitialised_is_nan():
        y, packed = launch(read(region, (x, seeds)), region.kernel)
    keep = mask_of(packed)
    assert torch.equal(y, x * keep * (1 / (1 - DROPPED)))
    assert packed.nbytes * 8 == x.numel()
    spread = (DROPPED * (1 - DROPPED) / x.numel()) ** 0.5
    assert abs(keep.float().mean().item() - (1 - DROPPED)) < 5 * spread
    ideal = 2 * x.nbytes + packed.nbytes + seeds.element_size()
    assert region.ideal_bytes == ideal
    assert launches[0].dram_bytes <= 1.02 * ideal
    assert launches[0].conflicts == []
    other_seed = launch(read(region, (x, seeds + 1)), region.kernel)
    assert not torch.equal(other_seed[1], packed)
    for tiling in (1, 2):
        again = launch(read(region, (x, seeds)), region.kernel, tiling)
        assert all(torch.equal(a, b) for a, b in zip(again, (y, packed), strict=True))
    (dx,) = dropout_backward(torch.ones_like(x), packed)
    assert torch.equal(dx != 0, keep)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_dropout_compiles_well(target: Any) -> None:
    assert problems(dropout, (bfloat16(64, 4096), torch.tensor([1, 2, 3])), target) == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_rows_in_blocks_compile_well(target: Any) -> None:
    sample = norm_inputs(torch.bfloat16, 4, 40000)
    assert "range(0, 40000, BLOCK)" in lowered(add_norm_quantise, sample).kernel
    assert problems(add_norm_quantise, sample, target) == []


def test_rows_in_blocks_move_each_byte_once_and_are_right() -> None:
    sample = norm_inputs(torch.bfloat16, 4, 40000)
    for spec in specs_of(add_norm_quantise, sample):
        assert check_spec(replace(spec, l2_share=3.0), sample) == []  # once for each pass


def sliced(x: Tensor) -> tuple[Tensor, ...]:
    gate, up = x.chunk(2, -1)
    return (torch.sigmoid(gate) * gate * up,)


def repeated(x: Tensor) -> tuple[Tensor, ...]:
    angle = torch.linspace(0, 1, x.shape[-3] * x.shape[-1]).view(x.shape[-3], 1, x.shape[-1])
    return x * angle.tanh(), x * angle.exp()


@pytest.mark.parametrize("function", [sliced, repeated])
def test_strides_are_read_without_a_copy(function: Function) -> None:
    x = draw(torch.float32, 3, 5, 4, 64)
    regions = choose_regions(traced(function, (x,)).graph)
    region = lower_rows(regions[0], DEVICES["h100"])
    gm = traced(function, (x,))
    assert len(regions) == 1
    values = {n.name: v for n, v in zip(gm.graph.nodes, nodes_values(gm, x), strict=True)}
    with trace() as launches, uninitialised_is_nan():
        results = launch([values[n.name] for n in region.inputs], region.kernel)
    for node, mine in zip(region.results, results, strict=True):
        torch.testing.assert_close(mine, values[node.name], rtol=1e-6, atol=1e-7)
    assert launches[0].dram_bytes <= 1.02 * int(region.ideal_bytes)


def nodes_values(gm: fx.GraphModule, *inputs: Tensor) -> list[Any]:
    """What each node of a graph gives."""
    interpreter = fx.Interpreter(gm, garbage_collect_values=False)
    interpreter.run(*inputs)
    return [interpreter.env.get(node) for node in gm.graph.nodes]


def test_offsets_beyond_31_bits_are_followed() -> None:
    """Rows that lie a gigabyte apart, in memory that is never touched in between."""
    far = torch.empty(3 * 2**30, dtype=torch.int8).as_strided((3, 64), (2**30, 1))
    far.copy_(torch.randint(-100, 100, (3, 64), dtype=torch.int8))

    def scaled(x: Tensor) -> tuple[Tensor, ...]:
        z = x.float()
        return (z / z.abs().amax(-1, keepdim=True),)

    region = lowered(scaled, (far,))
    (result,) = launch([far], region.kernel)
    assert torch.equal(result, scaled(far)[0])


def test_the_same_graph_gives_the_same_text() -> None:
    sample = norm_inputs(torch.bfloat16, 16, 256)
    one, two = (lowered(add_norm_quantise, sample) for _ in range(2))
    assert (one.kernel, one.plain) == (two.kernel, two.plain)


def test_rows_that_vary_need_no_new_text() -> None:
    sample = norm_inputs(torch.float32, 4, 6, 64)
    region = lowered(add_norm_quantise, sample, traced_for_any_rows)
    assert "size_0" in region.kernel
    for rows in ((4, 6), (3, 11), (1, 1)):
        other = norm_inputs(torch.float32, *rows, 64)
        mine = returned_values(region, other)
        for one, plain in zip(mine, add_norm_quantise(*other), strict=True):
            torch.testing.assert_close(one, plain, rtol=1e-6, atol=1e-6)


def returned_values(region: LoweredRows, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of a region whose sizes vary, in the graph's order."""
    placeholders = region.results[0].graph.find_nodes(op="placeholder")
    tensors = [n for n in placeholders if isinstance(n.meta["val"], Tensor)]
    given = [inputs[tensors.index(n)] for n in region.inputs]
    found = launch(given, region.kernel)
    (output,) = region.results[0].graph.find_nodes(op="output")
    return [found[region.results.index(node)] for node in output.args[0]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    x = draw(torch.float32, 4, 96)
    x[2, 5] = value

    def stable(x: Tensor) -> tuple[Tensor, ...]:
        away = x - x.amax(-1, keepdim=True)
        return away.exp(), away.clamp(-1, 1), torch.maximum(x, -x)

    region = lowered(stable, (x,))
    mine = returned(region, launch([x], region.kernel))
    for one, plain in zip(mine, stable(x), strict=True):
        torch.testing.assert_close(one, plain, equal_nan=True)
