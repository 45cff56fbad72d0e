"""No gated activation moves more bytes than liger's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("liger_kernel")

from bench.triton.interpreter import install
from bench.triton.trace import trace
from memopt.kernels import triton_gated

Tensor = torch.Tensor

install()


def dram_bytes(run: Callable[[], Any]) -> int:
    with trace() as launches:
        run()
    assert launches
    return sum(launch.dram_bytes for launch in launches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32, 2048), (2, 8, 1536), (9, 999)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_two_tensors_move_no_more_than_in_liger(
    activation: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    from liger_kernel.ops import geglu, swiglu

    theirs = {
        "silu": (swiglu.swiglu_forward, swiglu.swiglu_backward),
        "gelu_tanh": (geglu.geglu_forward, geglu.geglu_backward),
    }
    forward, backward = theirs[activation]
    gate, up, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    copies = gate.clone(), up.clone(), dy  # liger's backward writes over its inputs
    assert dram_bytes(lambda: triton_gated.forward(gate, up, activation)) <= dram_bytes(
        lambda: forward(gate, up)
    )
    assert dram_bytes(lambda: triton_gated.backward(dy, gate, up, activation, False)) <= (
        dram_bytes(lambda: backward(*copies))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(32, 2048), (2, 8, 1536), (9, 999)], ids=str)
def test_one_packed_tensor_moves_no_more_than_in_liger(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    from liger_kernel.ops.swiglu import (
        swiglu_fused_gate_up_backward,
        swiglu_fused_gate_up_forward,
    )

    x, dy = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    assert dram_bytes(lambda: triton_gated.packed_forward(x, "silu", False)) <= dram_bytes(
        lambda: swiglu_fused_gate_up_forward(x)
    )
    assert dram_bytes(
        lambda: triton_gated.packed_backward(dy, x, "silu", False, False)
    ) <= dram_bytes(lambda: swiglu_fused_gate_up_backward(x, dy))
