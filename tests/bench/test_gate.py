"""The gate passes what is right, and says what is wrong with the rest."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bench.triton.gate import Build, Traffic, check, in_float64, numbers
from bench.triton.interpreter import install
from tests.bench import sample_kernels as kernels

install()
X = torch.arange(1, 4097, dtype=torch.float32)
BYTES = 2 * X.nbytes
DECLARED = Traffic(dram_bytes=BYTES, l2_bytes=BYTES)
BUILD = Build(
    kernel=kernels.copy,
    arguments={"x_ptr": X.dtype, "out_ptr": X.dtype, "n": 4096, "shift": 0, "BLOCK": 1024},
    options={"num_warps": 4},
)


def copied(count: int = 4096, **_: int) -> Callable[[], Sequence[Tensor]]:
    def run() -> Sequence[Tensor]:
        out = torch.full_like(X, torch.nan)
        kernels.copy[(4,)](X, out, count, 0, BLOCK=1024)
        return [out]

    return run


def last_writer() -> Sequence[Tensor]:
    out = torch.zeros(1, dtype=torch.int32)
    kernels.last_program[(16,)](out)
    return [out.float()]


def test_a_right_kernel_passes() -> None:
    assert check(copied(), [X.double()], [X], DECLARED, BUILD, targets=[90]) == []


def test_a_result_that_is_not_written_is_wrong() -> None:
    found = check(copied(4095), [X.double()], [X], DECLARED)
    assert len(found) == 1
    assert "off by nan" in found[0]


def test_an_error_above_the_reference_is_wrong() -> None:
    found = check(copied(), [X.double() + 1], [X + 1], DECLARED)
    assert ["off by" in problem for problem in found] == [True]


@pytest.mark.parametrize("name", ["dram", "l2"])
def test_more_traffic_than_declared_is_wrong(name: str) -> None:
    declared = replace(DECLARED, **{f"{name}_bytes": BYTES // 2})
    found = check(copied(), [X.double()], [X], declared)
    assert found == [f"moves {BYTES} bytes of {name}, and declares {BYTES // 2}"]


def test_a_race_and_what_follows_from_it_are_wrong() -> None:
    loose = Traffic(dram_bytes=2**20, l2_bytes=2**20, coalescing=0)
    exact = torch.full((1,), 15.0)
    found = check(last_writer, [exact.double()], [exact], loose)
    assert any("kind='race'" in problem for problem in found)
    assert any("depend on the order of programs" in problem for problem in found)


def test_loads_that_are_no_vectors_and_missing_tensor_cores_are_wrong() -> None:
    build = replace(BUILD, arguments={**BUILD.arguments, "n": 4099}, matrix_products=True)
    found = check(copied(), [X.double()], [X], DECLARED, build, targets=[90])
    assert ["128 bits" in found[0], "tensor cores" in found[1], len(found)] == [True, True, 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_and_bools_must_be_those_of_the_reference(dtype: torch.dtype) -> None:
    plain = torch.tensor([0, 1, 1]).to(dtype)
    wrong = torch.tensor([0, 0, 1]).to(dtype)
    assert numbers([plain], [wrong.double()], [plain]) == []
    assert numbers([wrong], [wrong.double()], [plain]) == ["result 0 is not the reference's"]
    assert numbers([plain[:2]], [plain.double()], [plain]) == ["result 0 is not the reference's"]


def test_in_float64_dtypes_of_results_are_too_and_whole_numbers_stay() -> None:
    arguments = (torch.ones(2), torch.ones(2, dtype=torch.uint8), torch.bfloat16, [3, None], 0.5)
    widened = in_float64(arguments)
    assert widened[0].dtype == widened[2] == torch.float64
    assert widened[1] is arguments[1]
    assert widened[3:] == arguments[3:]
