"""Parts of a backward run as soon as they can: the same gradients, fewer bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import memopt
from memopt.passes.early_backward import EarlyBackward
from tests.graphs import OPERATORS, Captured, Program, assert_same, lowered, programs, seeded
from tests.references import assert_equal_in_float64
from tests.test_liveness import UNSEEN_BYTES, measured_peak

ON: dict[str, Any] = {EarlyBackward.name: True}
ROWS, WIDTH = 256, 16
Function = Callable[..., tuple[Tensor]]


def micro_batches(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    """One step over four of them."""
    losses = []
    for part in x.chunk(4):
        for weight in weights:
            part = torch.tanh(part @ weight)
        losses.append(part.square().mean())
    return (torch.stack(losses).mean(),)


def summed(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    """The same, as a loop adds them up."""
    total = x.new_zeros(())
    for part in x.chunk(4):
        for weight in weights:
            part = F.gelu(part @ weight)
        total = total + part.square().mean() / 4
    return (total,)


def local(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    """Layers with losses of their own, whose gradients stop between them."""
    total = x.new_zeros(())
    for weight in weights:
        x = torch.tanh(x.detach() @ weight)
        total = total + x.softmax(-1).square().mean()
    return (total,)


FORMS = (micro_batches, summed, local)


def arguments(layers: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(ROWS, WIDTH), *[(WIDTH, WIDTH)] * layers]
    x, *weights = (torch.randn(s, dtype=torch.float64) for s in shapes)
    return [x, *(weight.requires_grad_() for weight in weights)]


def planned(function: Function, tensors: list[Tensor], **options: Any) -> Captured:
    captured = lowered(function, **{"memory_budget": "min", "strict": True, **options})
    captured(*tensors)
    return captured


@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_one_part_is_alive_at_a_time_and_nothing_runs_twice(function: Function) -> None:
    """What takes a plan without it to recompute, where that fits at all."""
    tensors = arguments(layers=8)
    early = planned(function, tensors, passes=ON, memory_budget=None).outcome.chosen
    late = planned(function, tensors, memory_budget=None).outcome.chosen
    assert early.recompute_seconds == late.recompute_seconds == 0
    assert early.peak_bytes <= 0.4 * late.peak_bytes
    passes = {"cut_rows": False}
    same = planned(function, tensors, passes=passes, memory_budget=early.peak_bytes).outcome
    assert not same.fits or same.chosen.recompute_seconds > 0


@pytest.mark.parametrize(
    ("lowering", "scale", "budget"),
    [("eager", 1.0, None), ("eager", 0.3, None), ("eager", 0.3, "min"), ("inductor", 0.3, None)],
)
@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_gradients_are_eager_s(
    function: Function, lowering: str, scale: float, budget: Any
) -> None:
    tensors = arguments()
    torch._dynamo.reset()
    options: Any = {"lowering": lowering, "memory_budget": budget, "strict": True, "passes": ON}
    compiled: Any = torch.compile(function, backend="memopt", options=options)
    mine, expected = (
        torch.autograd.grad(scale * f(*tensors)[0], tensors[1:]) for f in (compiled, function)
    )
    assert_equal_in_float64(mine, expected)


@pytest.mark.parametrize("function", FORMS, ids=lambda f: f.__name__)
def test_the_predicted_peak_is_the_measured_one(function: Function) -> None:
    tensors = arguments()
    tensors[0].requires_grad_()
    captured = planned(function, tensors, passes=ON)
    measured = measured_peak(captured, tensors)
    assert 0 <= measured - captured.outcome.chosen.peak_bytes <= UNSEEN_BYTES


def in_parts(program: Program) -> Function:
    """The program on two inputs after each other, and the mean of both losses."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor]:
        first, second = program(x, y)[0], program(y.sin(), x)[0]
        return ((first + second) / 2,)

    return function


@settings(max_examples=40)
@given(programs(names=OPERATORS, is_loss=True), st.sampled_from([None, 0.9, 0.6, "min"]))
def test_random_sums_of_losses_have_eager_s_gradients(
    program: Program, budget: float | str | None
) -> None:
    tensors = program.arguments()
    function = in_parts(program)
    compiled = lowered(function, memory_budget=budget, passes=ON, strict=True)
    assert_same(seeded(compiled, tensors), seeded(function, tensors))


class Clamped(torch.autograd.Function):
    """A gradient that is not linear in the loss's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1e-3, 1e-3)


def clamped(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    total = x.new_zeros(())
    for weight in weights:
        x = torch.tanh(Clamped.apply(x.detach() @ weight))  # type: ignore[no-untyped-call]
        total = total + x.square().mean()
    return (total,)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_what_is_not_linear_reads_the_true_gradient(scale: float) -> None:
    tensors = arguments()
    compiled = lowered(clamped, memory_budget=0.5, passes=ON, strict=True)
    mine, expected = (
        torch.autograd.grad(scale * f(*tensors)[0], tensors[1:]) for f in (compiled, clamped)
    )
    assert_equal_in_float64(mine, expected)


def remarks(function: Any, *tensors: Tensor, **options: Any) -> str:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(nn.Parameter(t.detach()) for t in tensors[1:])

        def forward(self, x: Tensor) -> Any:
            return function(x, *self.weights)[0]

    torch._dynamo.reset()
    report = memopt.explain(
        Model(), tensors[0], options={"lowering": "eager", "passes": ON, **options}
    )
    return str(report.to_dict()["graphs"][0]["remarks"])


def chain(x: Tensor, *weights: Tensor) -> tuple[Tensor]:
    for weight in weights:
        x = torch.tanh(x @ weight)
    return (x.square().sum(),)


def test_one_loss_at_the_end_leaves_nothing_to_move() -> None:
    said = remarks(chain, *arguments())
    assert "needs the end of the forward" in said


def test_it_says_what_it_moved() -> None:
    assert "may run amid the forward" in remarks(local, *arguments())


def test_half_precision_stays_as_it_is() -> None:
    halves = [t.detach().half().requires_grad_() for t in arguments()]
    assert "needs the end of the forward" in remarks(local, *halves)


def test_it_runs_where_it_is_named_alone() -> None:
    assert EarlyBackward.name not in remarks(local, *arguments(), passes={})
