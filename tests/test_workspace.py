"""The scratch of library kernels, formula and probe, against the allocator."""

import pytest
import torch
from torch import Tensor

from memopt.memory.workspace import workspace_bytes
from tests.scratch import scratch_of

aten = torch.ops.aten


def attention(batch: int, heads: int, length: int, head: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(batch, length, heads, head, dtype=dtype).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length", "head"), [(16, 8), (100, 16), (512, 64), (800, 32)])
def test_attention_forward_holds_what_the_formula_says(
    length: int, head: int, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    args = (*attention(1, 2, length, head, dtype), 0.0, True)
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert workspace_bytes(op, args, {}, None) == scratch_of(lambda: op(*args))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("length", "head"), [(16, 8), (100, 16), (512, 64), (800, 32)])
def test_attention_backward_holds_what_the_formula_says(
    length: int, head: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    query, key, value = attention(1, 2, length, head, torch.float32)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
    args = (torch.randn_like(out), query, key, value, out, lse, 0.0, True)
    op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert workspace_bytes(op, args, {}, None) == scratch_of(lambda: op(*args))


def test_a_convolution_is_probed() -> None:
    x, weight = torch.randn(2, 8, 16, 16), torch.randn(16, 8, 3, 3)
    args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    op = aten.convolution.default
    assert workspace_bytes(op, args, {}, None) == scratch_of(lambda: op(*args))


def test_type_promotion_copies_an_operand() -> None:
    args = (torch.randn(64, 64, dtype=torch.float64), torch.randn(64, 64))
    op = aten.mul.Tensor
    found = workspace_bytes(op, args, {}, None)
    assert found == scratch_of(lambda: op(*args))


def test_a_probe_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    workspace_bytes(aten.native_dropout.default, (torch.randn(0, 7) + 1, 0.5, True), {}, None)
    workspace_bytes(aten.native_dropout.default, (torch.ones(9, 7), 0.5, True), {}, None)
    assert torch.equal(torch.rand(3), expected)


def test_what_is_not_known_counts_as_nothing() -> None:
    assert workspace_bytes("mm", (), {}, None) == 0
    assert workspace_bytes(aten.mm.default, (torch.ones(2, 2), torch.ones(2, 2)), {}, None) == 0
