"""Compiling for a GPU that is not there shows what a kernel costs on it."""

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.ahead import TARGETS, Report, Target, compile_for
from bench.triton.interpreter import install
from tests.bench import sample_kernels as kernels

install()
COPY = {"x_ptr": torch.float32, "out_ptr": torch.float32, "shift": 0, "BLOCK": 1024}


@pytest.mark.parametrize("target", TARGETS)
def test_a_copy_moves_vectors_and_spills_nothing(target: Target) -> None:
    report = compile_for(kernels.copy, {**COPY, "n": 4096}, target, num_warps=4)
    assert report.problems() == []
    assert report.vector_loads == report.loads > 0
    assert report.vector_stores == report.stores > 0
    assert report.matrix_products == report.shared_bytes == 0
    assert 0 < report.registers < 64


def test_a_size_that_no_vector_divides_is_seen() -> None:
    report = compile_for(kernels.copy, {**COPY, "n": 4099}, 90, num_warps=4)
    assert report.loads > 0 == report.vector_loads


@pytest.mark.parametrize("target", TARGETS)
def test_a_product_uses_the_tensor_cores(target: Target) -> None:
    pointers = dict.fromkeys(("a_ptr", "b_ptr"), torch.bfloat16)
    arguments = {**pointers, "out_ptr": torch.float32, "SIZE": 64, "PRECISION": "ieee"}
    report = compile_for(kernels.product, arguments, target, num_warps=4)
    assert report.matrix_products > 0
    assert 0 < report.shared_bytes <= report.shared_limit_bytes


def test_more_values_than_registers_are_spilled() -> None:
    arguments = {"x_ptr": torch.float32, "out_ptr": torch.float32, "BLOCK": 8192}
    report = compile_for(kernels.many_values, arguments, 90, num_warps=1)
    assert report.spilled_bytes > 0
    assert any("spills" in problem for problem in report.problems())


@pytest.mark.parametrize("config", [0, 1])
def test_a_configuration_of_an_autotuned_kernel_compiles(config: int) -> None:
    report = compile_for(kernels.tuned, {"out_ptr": torch.int32, "n": 4}, 90, config=config)
    assert report.stores == 1


def test_a_kernel_that_was_compiled_is_still_interpreted() -> None:
    x, out = torch.randn(64), torch.empty(64)
    compile_for(kernels.copy, {**COPY, "n": 4096}, 90)
    kernels.copy[(1,)](x, out, 64, 0, BLOCK=64)
    assert torch.equal(x, out)


def test_too_much_shared_memory_is_a_problem() -> None:
    sizes = {"registers": 1, "spilled_bytes": 0, "shared_bytes": 2, "shared_limit_bytes": 1}
    counts = dict.fromkeys("loads vector_loads stores vector_stores matrix_products".split(), 0)
    assert "shared memory" in Report(target=90, **sizes, **counts).problems()[0]
