"""The numbers of gated activations against their plain spellings, and what they refuse."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bench.triton.interpreter import install
from memopt._torch import FakeTensorMode, aot_autograd
from memopt.errors import ConfigError
from memopt.kernels import gated, serving
from memopt.kernels.gated import GATED, GATED_BACKWARD
from memopt.kernels.gated_packed import GATED_PACKED, GATED_PACKED_BACKWARD
from tests.kernels.gated_cases import SPELLED, spelled, spelled_packed
from tests.references import (
    LOW_PRECISION,
    assert_draws_within_reference_error,
    assert_equal_in_float64,
    assert_within_reference_error,
    doubles,
    run,
)

Tensor = torch.Tensor
Results = tuple[list[Tensor], list[Tensor], list[Tensor]]
every_activation = pytest.mark.parametrize("activation", SPELLED)
every_dtype = pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)

install()


@pytest.fixture(params=["plain", "interpreted"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in plain code, once in Triton, which is interpreted on the CPU."""
    if request.param == "interpreted":
        monkeypatch.setattr(serving, "knows", lambda device: True)


def test_every_activation_has_a_spelling() -> None:
    assert set(gated.ACTIVATIONS) == set(SPELLED)


@every_activation
def test_it_is_differentiable_twice(activation: str) -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    operator = partial(GATED, activation=activation)
    assert torch.autograd.gradcheck(operator, (gate, up))
    assert torch.autograd.gradgradcheck(operator, (gate, up))


@every_activation
@pytest.mark.parametrize("gate_last", [False, True])
def test_packed_it_is_differentiable_twice(activation: str, gate_last: bool) -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    operator = partial(GATED_PACKED, activation=activation, gate_last=gate_last)
    assert torch.autograd.gradcheck(operator, (x,))
    assert torch.autograd.gradgradcheck(operator, (x,))


@every_activation
def test_in_float64_it_is_its_spelling_and_so_are_its_gradients(activation: str) -> None:
    gate, up, dy = 3 * torch.randn(3, 5, 16, dtype=torch.float64)
    mine, plain = (partial(f, activation=activation) for f in (GATED, spelled))
    assert_equal_in_float64(run(mine, [gate, up], dy), run(plain, [gate, up], dy))


@every_activation
@pytest.mark.parametrize("gate_last", [False, True])
def test_packed_in_float64_it_is_its_spelling(activation: str, gate_last: bool) -> None:
    x, dy = 3 * torch.randn(5, 32, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    options: dict[str, Any] = {"activation": activation, "gate_last": gate_last}
    mine, plain = (partial(f, **options) for f in (GATED_PACKED, spelled_packed))
    assert_equal_in_float64(run(mine, [x], dy), run(plain, [x], dy))


@every_dtype
@every_activation
def test_it_is_as_near_to_float64_as_eager_is(
    either: None, activation: str, dtype: torch.dtype
) -> None:
    mine, plain = (partial(f, activation=activation) for f in (GATED, spelled))

    def draw() -> Results:
        gate, up, dy = torch.randn(3, 8, 300).to(dtype)
        exact = run(plain, doubles([gate, up]), dy.double())
        return run(mine, [gate, up], dy), exact, run(plain, [gate, up], dy)

    assert_draws_within_reference_error(draw, 3)


@every_dtype
@pytest.mark.parametrize("gate_last", [False, True])
def test_packed_it_is_as_near_to_float64_as_eager_is(
    either: None, gate_last: bool, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"activation": "silu", "gate_last": gate_last}
    mine, plain = (partial(f, **options) for f in (GATED_PACKED, spelled_packed))

    def draw() -> Results:
        x, dy = torch.randn(8, 2 * 300).to(dtype), torch.randn(8, 300).to(dtype)
        return run(mine, [x], dy), run(plain, [x.double()], dy.double()), run(plain, [x], dy)

    assert_draws_within_reference_error(draw, 3)


def test_a_second_derivative_does_without_the_kernel(either: None) -> None:
    def second(operator: Any, x: Tensor, dy: Tensor, weight: Tensor) -> list[Tensor]:
        """Gradients of a weighted sum of gradients, by the input and the upstream gradient."""
        x, dy = x.clone().requires_grad_(), dy.clone().requires_grad_()
        y = operator(x, "silu", False)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return list(torch.autograd.grad((dx * weight).sum(), (x, dy)))

    def draw() -> Results:
        inputs = torch.randn(8, 600), torch.randn(8, 300), torch.randn(8, 600)
        exact = second(spelled_packed, *(t.double() for t in inputs))
        return second(GATED_PACKED, *inputs), exact, second(spelled_packed, *inputs)

    assert_draws_within_reference_error(draw, 3)


@pytest.mark.parametrize("size", [6.0, 12.0, 40.0, 1e4, 6e4, 1e30])
@pytest.mark.parametrize("sign", [1, -1])
@every_dtype
@every_activation
def test_no_gate_is_too_large(
    either: None, activation: str, dtype: torch.dtype, sign: int, size: float
) -> None:
    gate = (sign * size * (1 - torch.rand(64, dtype=torch.float64) / 16)).to(dtype)
    if gate.isinf().any():
        return
    up, dy = torch.randn(2, 64).to(dtype)
    mine = run(partial(GATED, activation=activation), [gate, up], dy)
    # autograd's 1 - sigmoid(x) has no digits left at 40, in float64 either
    exact, plain = (
        gated.plain(*inputs, activation)
        + gated.plain_backward(upstream, *inputs, activation, False)[:2]
        for inputs, upstream in (((gate.double(), up.double()), dy.double()), ((gate, up), dy))
    )
    there = [true.to(dtype).isfinite() for true in exact]
    for result, finite in zip(mine, there, strict=True):
        assert torch.equal(result.isfinite(), finite)
        assert not result.isnan().any()
    numbers = (
        [t[finite] for t, finite in zip(results, there, strict=True)]
        for results in (mine, exact, plain)
    )
    assert_within_reference_error(*numbers)


@every_activation
def test_a_gate_that_is_no_number_spoils_its_own_entry_and_no_other(
    either: None, activation: str
) -> None:
    gate, up, dy = torch.randn(3, 64)
    gate[5] = torch.nan
    y, *gradients = run(partial(GATED, activation=activation), [gate, up], dy)
    assert y[5].isnan()
    for result in (y, *gradients):
        assert result[torch.arange(64) != 5].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 4)], ids=str)
def test_empty_tensors_stay_empty(either: None, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16)
    results = run(partial(GATED, activation="silu"), [x, x])
    results += run(partial(GATED_PACKED, activation="silu", gate_last=False), [x])
    half = (*shape[:-1], shape[-1] // 2)
    assert [result.shape for result in results] == [shape, shape, shape, half, shape]
    assert {result.dtype for result in results} == {x.dtype}


def test_single_numbers_will_do(either: None) -> None:
    gate, up = torch.randn(2)
    mine, plain = (partial(f, activation="silu") for f in (GATED, spelled))
    torch.testing.assert_close(run(mine, [gate, up]), run(plain, [gate, up]))


def test_the_backward_gives_the_result_once_more(either: None) -> None:
    gate, up, dy = torch.randn(3, 4, 64)
    *gradients, y = GATED_BACKWARD(dy, gate, up, "gelu_tanh", True)
    assert torch.equal(y, GATED(gate, up, "gelu_tanh"))
    *alone, nothing = GATED_BACKWARD(dy, gate, up, "gelu_tanh", False)
    assert not nothing.numel()
    assert all(torch.equal(a, b) for a, b in zip(gradients, alone, strict=True))


def unknown() -> Iterator[tuple[Any, tuple[Any, ...]]]:
    half, x = torch.ones(2, 4), torch.ones(2, 8)
    yield GATED, (half, half, "swish")
    yield GATED_BACKWARD, (half, half, half, "swish", False)
    yield GATED_PACKED, (x, "swish", False)
    yield GATED_PACKED_BACKWARD, (half, x, "swish", False, False)


@pytest.mark.parametrize(("operator", "arguments"), [*unknown()])
def test_an_unknown_activation_is_refused(
    either: None, operator: Any, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(ConfigError, match="activation='swish': allowed is 'silu', 'gelu', "):
        operator(*arguments)


def test_an_unknown_activation_is_refused_while_tracing() -> None:
    with FakeTensorMode(), pytest.raises(ConfigError, match="activation='swish'"):
        GATED(torch.ones(2, 4), torch.ones(2, 4), "swish")


@pytest.mark.parametrize("up", [torch.ones(1, 4), torch.ones(2, 4).half()])
def test_a_gate_unlike_its_up_is_refused(either: None, up: Tensor) -> None:
    with pytest.raises(ConfigError, match="expand or cast before"):
        GATED(torch.ones(2, 4), up, "silu")


@pytest.mark.parametrize("shape", [(2, 5), ()])
def test_what_has_no_halves_is_refused(either: None, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="2F"):
        GATED_PACKED(torch.ones(shape), "silu", False)


def test_shapes_are_followed_where_they_are_dynamic() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def step(x: Tensor) -> tuple[Tensor, ...]:
        gate, up = x.chunk(2, -1)
        return GATED(gate, up, "silu") + 1, GATED_PACKED(x, "gelu", True).mul(2)

    compiled = torch.compile(step, dynamic=True, backend=backend, fullgraph=True)
    for shape in ((3, 5, 16), (7, 2, 24)):
        x = torch.randn(shape)
        for actual, expected in zip(compiled(x), step(x), strict=True):
            assert torch.equal(actual, expected)
    assert len(graphs) == 1


def test_a_traced_backward_calls_the_operators() -> None:
    called: set[Any] = set()

    def compiler(graph: Any, inputs: Any) -> Any:
        called.update(node.target for node in graph.graph.nodes)
        return graph

    def step(x: Tensor) -> tuple[Tensor, ...]:
        return GATED(*x.exp().chunk(2, -1), "silu"), GATED_PACKED(x.exp(), "gelu", True)

    compiled = torch.compile(step, backend=aot_autograd(fw_compiler=compiler), dynamic=True)
    results = compiled(torch.randn(3, 16, requires_grad=True))
    torch.autograd.backward([y.sum() for y in results])
    assert {GATED, GATED_BACKWARD, GATED_PACKED, GATED_PACKED_BACKWARD} <= called
