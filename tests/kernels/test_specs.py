"""Every kernel that states what it does passes the gate, in every dtype and on every target."""

from typing import Any

import pytest
import torch
import torch._dynamo
from torch.utils import _pytree as pytree

pytest.importorskip("triton")

from bench.triton.ahead import TARGETS
from bench.triton.gate import check_spec, compile_spec, in_float64, numbers
from bench.triton.interpreter import install
from memopt.kernels import serving, specs
from memopt.kernels.spec import KernelSpec
from tests.references import LOW_PRECISION
from tests.scratch import assert_scratch_is_within

install()
SPECS = {spec.name: spec for spec in specs()}


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_interpreted_it_is_right_and_moves_what_it_must(
    spec: KernelSpec, dtype: torch.dtype
) -> None:
    for number, sample in enumerate(spec.samples(dtype)):
        assert check_spec(spec, sample) == [], f"sample {number}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_its_usual_forms_compile_well(spec: KernelSpec, target: Any, dtype: torch.dtype) -> None:
    for sample in [*spec.samples(dtype)][:3]:
        assert compile_spec(spec, sample, [target]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_operator_says_what_it_returns(spec: KernelSpec, dtype: torch.dtype) -> None:
    for sample in spec.samples(dtype):
        torch.library.opcheck(spec.operator, sample)


@pytest.mark.parametrize("interpreted", [False, True], ids=["plain", "interpreted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_allocates_no_more_than_it_says(
    spec: KernelSpec, dtype: torch.dtype, interpreted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "knows", lambda device: interpreted)
    for sample in spec.samples(dtype):
        assert_scratch_is_within(spec, *sample)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_allocates_no_more_where_dynamo_runs_its_frames(
    spec: KernelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call from such a frame holds its arguments until it returns."""
    monkeypatch.setattr(serving, "knows", lambda device: False)
    for sample in spec.samples(torch.bfloat16):
        assert_scratch_is_within(spec, *sample, run=torch._dynamo.run)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_compiled_it_is_right(spec: KernelSpec, dtype: torch.dtype) -> None:
    for sample in spec.samples(dtype):
        there = pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), sample)
        results = [result.cpu() for result in spec(*there)]
        assert numbers(results, spec.plain(*in_float64(sample)), spec.plain(*sample)) == []
