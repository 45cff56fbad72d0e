"""Generated kernels pass the gate that written ones pass, also where no other compiler has one."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.triton.ahead import TARGETS
from bench.triton.gate import check_spec, uninitialised_is_nan
from bench.triton.interpreter import install
from bench.triton.trace import trace
from memopt.kernels.region import launch, plain
from memopt.kernels.spec import KernelSpec
from tests.references import LOW_PRECISION, assert_within_reference_error
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


def spec_of(function: Function, sample: Sequence[Tensor]) -> KernelSpec:
    """A generated kernel as one that states what it does; its reference is the function."""
    region = lowered(function, sample)

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        return returned(region, launch(read(region, args), region.kernel))

    def samples(dtype: torch.dtype) -> Iterator[Sequence[Tensor]]:
        yield sample

    return KernelSpec(
        name="memopt::region",
        plain=function,
        launch=run,
        samples=samples,  # type: ignore[arg-type]
        l2_share=1.5,
        source="memopt",
    )


@cases
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_it_is_right_and_moves_what_it_must(
    function: Function, inputs: Any, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    sample = inputs(dtype, *shape)
    assert check_spec(spec_of(function, sample), sample) == []


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_well(
    function: Function, inputs: Any, target: Any, dtype: torch.dtype
) -> None:
    sample = inputs(dtype, 64, 4096)
    assert check_spec(spec_of(function, sample), sample, [target]) == []
