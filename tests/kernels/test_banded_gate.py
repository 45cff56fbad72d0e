"""Banded attention passes the gate that every kernel passes; most of its forms are slow to."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

pytest.importorskip("triton")

from bench.triton.ahead import TARGETS
from bench.triton.gate import check_spec, compile_spec, in_float64, numbers
from bench.triton.interpreter import install
from memopt.kernels import serving
from memopt.kernels.banded_attention import SPECS
from memopt.kernels.spec import KernelSpec
from tests.references import LOW_PRECISION
from tests.scratch import assert_scratch_is_within

install()
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
slow = pytest.mark.slow
FORMS = [
    pytest.param(number, dtype, target, marks=[] if (number, dtype) == usual else [slow])
    for usual in [(0, torch.bfloat16)]
    for number in range(4)
    for dtype in (torch.bfloat16, torch.float32)
    for target in TARGETS
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=str
)
@every_spec
def test_interpreted_it_is_right_and_moves_what_it_must(
    spec: KernelSpec, dtype: torch.dtype
) -> None:
    for number, sample in enumerate(spec.samples(dtype)):
        assert check_spec(spec, sample) == [], f"sample {number}"


@pytest.mark.parametrize(("number", "dtype", "target"), FORMS)
@every_spec
def test_its_forms_compile_well(
    spec: KernelSpec, number: int, dtype: torch.dtype, target: Any
) -> None:
    assert compile_spec(spec, [*spec.samples(dtype)][number], [target]) == []


@every_spec
def test_the_operator_says_what_it_returns(spec: KernelSpec) -> None:
    for sample in spec.samples(torch.bfloat16):
        torch.library.opcheck(spec.operator, sample)


@pytest.mark.parametrize("interpreted", [False, True], ids=["plain", "interpreted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_spec
def test_it_allocates_no_more_than_it_says(
    spec: KernelSpec, dtype: torch.dtype, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "knows", lambda device: interpreted)
    for sample in [*spec.samples(dtype)][: 2 if interpreted else None]:
        assert_scratch_is_within(spec, *sample)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@every_spec
def test_compiled_it_is_right(spec: KernelSpec, dtype: torch.dtype) -> None:
    for sample in spec.samples(dtype):
        there: Sequence[Any] = pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), sample)
        results = [result.cpu() for result in spec(*there)]
        assert numbers(results, spec.plain(*in_float64(sample)), spec.plain(*sample)) == []
