"""How gated activations touch memory: strides, tiles, far offsets, what is saved, scratch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter as stock

from bench.triton.ahead import TARGETS, Target
from bench.triton.gate import compile_spec
from bench.triton.interpreter import install
from bench.triton.trace import trace
from memopt.kernels import gated, gated_packed, serving, triton_gated
from memopt.kernels.gated import GATED
from memopt.kernels.gated_packed import GATED_PACKED, GATED_PACKED_BACKWARD
from tests.kernels.gated_cases import SPELLED, spelled
from tests.references import run
from tests.scratch import assert_scratch_is, assert_scratch_is_stated, scratch_of

Tensor = torch.Tensor

install()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators run Triton on the CPU too, where it is interpreted."""
    monkeypatch.setattr(serving, "knows", lambda device: True)


def test_halves_are_read_and_written_where_they_lie(interpreted: None) -> None:
    x, dy = torch.randn(4, 6, 2 * 96, requires_grad=True), torch.randn(4, 6, 96)
    gate, up = x.chunk(2, -1)
    with trace() as launches:
        GATED(gate, up, "silu").backward(dy)
        (dx,) = torch.autograd.grad(GATED_PACKED(x, "silu", False), x, dy)
    assert [launch.name for launch in launches] == ["gated_forward", "gated_backward"] * 2
    for launch in launches:
        assert launch.arguments["gate_ptr"].data_ptr() == gate.data_ptr()
        assert launch.arguments["up_ptr"].data_ptr() == up.data_ptr()
    assert launches[-1].arguments["dgate_ptr"].data_ptr() == dx.data_ptr()
    assert x.grad is not None
    assert torch.equal(dx, x.grad)


def test_other_strides_are_copied(interpreted: None) -> None:
    gate, up = torch.randn(24, 5, 3).permute(2, 1, 0), torch.randn(3, 5, 48)[..., ::2]
    mine, plain = (partial(f, activation="gelu") for f in (GATED, spelled))
    torch.testing.assert_close(run(mine, [gate, up]), run(plain, [gate, up]))


def test_an_expanded_gradient_is_no_obstacle(interpreted: None) -> None:
    x = torch.randn(6, 2 * 24, requires_grad=True)
    gradients = (
        torch.autograd.grad(of(x.view(2, 3, 48), "silu", False).sum(), x)[0]
        for of in (GATED_PACKED, lambda *args: gated_packed.SPEC.plain(*args)[0])
    )
    torch.testing.assert_close(*gradients)


def test_contiguous_tensors_of_any_width_leave_no_lane_idle(interpreted: None) -> None:
    gate, up = torch.randn(2, 64, 520)
    with trace() as launches:
        GATED(gate, up, "silu")
    assert launches[0].programs == -(-gate.numel() // 1024)


@pytest.mark.parametrize("width", [48, 96, 520, 1100, 1536, 4864, 11008])
def test_tiles_of_halves_leave_few_lanes_idle(width: int) -> None:
    half = torch.empty(64, 2 * width)[:, :width]
    (programs,), constants = triton_gated._tiles(half, "silu")
    lanes = programs * constants["ROWS"] * constants["BLOCK"]
    assert half.numel() <= lanes <= half.numel() * 3 / 2


def test_rows_beyond_two_to_the_31st_are_reached(interpreted: None) -> None:
    stride = 2**30 + 16  # of virtual memory; only a few pages are touched
    near, dy = torch.randn(3, 80).half(), torch.randn(3, 40).half()
    far = torch.empty(2 * stride + 80, dtype=torch.float16).as_strided((3, 80), (stride, 1))
    far.copy_(near)
    assert torch.equal(GATED_PACKED(far, "silu", False), GATED_PACKED(near, "silu", False))
    pairs = (GATED_PACKED_BACKWARD(dy, x, "silu", False, True) for x in (far, near))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("entries", [2**31 - 8, 2**31 + 8])
def test_a_flat_tile_next_to_two_to_the_31st_is_reached(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = (torch.empty(1, entries, dtype=torch.float16) for _ in range(2))
    (programs,), constants = triton_gated._tiles(x, "silu")
    end = slice(entries - entries % 1024, None)
    x[:, end].normal_()

    def only_the_last(builder: Any, *index: int) -> None:
        builder.grid_idx = (programs - 1, 0, 0)

    monkeypatch.setattr(stock.InterpreterBuilder, "set_grid_idx", only_the_last)
    strides = x.stride(0), x.stride(0)
    triton_gated.gated_forward[(1,)](x, x, y, *x.shape, *strides, **constants)
    monkeypatch.undo()
    (expected,) = triton_gated.forward(x[:, end], x[:, end], "silu")
    assert torch.equal(y[:, end], expected)


@pytest.mark.parametrize("kind", ["plain", "interpreted"])
def test_only_inputs_are_saved(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "interpreted":
        request.getfixturevalue(kind)
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    x = torch.randn(4, 16, requires_grad=True)
    saved: list[int] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        GATED(gate, up, "gelu")
        GATED_PACKED(x, "gelu", False)
    assert saved == [t.data_ptr() for t in (gate, up, x)]


# The other three are among the first samples of the specs.
@pytest.mark.parametrize("activation", ["relu", "relu_squared", "sigmoid", "quick_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_every_activation_compiles_to_vector_loads(
    activation: str, dtype: torch.dtype, target: Target
) -> None:
    dy, gate, up = torch.randn(3, 4096).to(dtype)
    assert compile_spec(gated.BACKWARD_SPEC, (dy, gate, up, activation, True), [target]) == []


def calls(dtype: torch.dtype, activation: str) -> Iterator[tuple[int, Callable[[], object]]]:
    """Of every operator: the bytes that its formula says, and a call."""
    gate, up, dy = torch.randn(3, 64, 1024, dtype=dtype)
    x = torch.cat((gate, up), -1)
    for spec, *args in (
        (gated.SPEC, gate, up, activation),
        (gated.BACKWARD_SPEC, dy, gate, up, activation, True),
        (gated_packed.SPEC, x, activation, False),
        (gated_packed.BACKWARD_SPEC, dy, x, activation, False, True),
    ):
        yield spec.scratch(*args), partial(spec.operator, *args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scratch_of_the_hungriest_activation_is_what_the_formulas_say(dtype: torch.dtype) -> None:
    of_forwards, of_backwards = calls(dtype, "quick_gelu"), calls(dtype, "gelu_tanh")
    for number, (forward, backward) in enumerate(zip(of_forwards, of_backwards, strict=True)):
        assert_scratch_is(*(backward if number % 2 else forward))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", SPELLED)
def test_no_activation_takes_more_scratch(activation: str, dtype: torch.dtype) -> None:
    for allowed, call in calls(dtype, activation):
        assert scratch_of(call) <= allowed + 64  # numbers of Python become tensors


def test_scratch_of_a_launch_is_what_it_copies(interpreted: None) -> None:
    even = torch.randn(64, 2, 1024).unbind(1)
    uneven = torch.randn(2, 16, 12, 1024).transpose(1, 2).unbind()
    transposed = torch.randn(2, 1024, 192).mT.unbind()
    for gate, up in (even, uneven, transposed):
        assert_scratch_is_stated(gated.SPEC, gate, up, "silu")
