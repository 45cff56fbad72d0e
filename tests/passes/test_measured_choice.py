"""An operator takes the place of nodes where it is no slower than Inductor's loops, as timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import memopt
from memopt.kernels.norm import NORM
from memopt.passes import fusing
from memopt.passes.fuse_norms import FuseNorms
from memopt.remarks import Remark
from memopt.trials import Trial
from tests.references import assert_equal_in_float64

WIDTH = 24


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def added_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total, weight), total


def draw(rows: int = 6, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width, requires_grad=True), torch.randn(width, requires_grad=True)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose CPU the kernels serve, and an empty memory of what was timed."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fusing, "serves", lambda x: True)
    return tmp_path / "memopt"


class Clock:
    """Says how long trials take; keeps which were asked for."""

    def __init__(self, operator: float, loops: float) -> None:
        self.operator, self.loops = operator, loops
        self.asked: list[Trial] = []

    def __call__(self, trial: Trial) -> float:
        self.asked.append(trial)
        fused = trial.graph.find_nodes(op="call_function", target=NORM)
        return self.operator if fused else self.loops


@pytest.fixture
def clock(served: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which the operator is the faster one."""
    clock = Clock(1.0, 2.0)
    monkeypatch.setattr(Trial, "seconds", lambda trial: clock(trial))
    return clock


def remarks_of(function: Callable[..., Any], *args: Tensor, **options: Any) -> list[Remark]:
    """What the pass says."""
    torch._dynamo.reset()
    report = memopt.explain(function, *args, options={"lowering": "eager", **options})
    (graph,) = report.graphs
    return [r for r in graph.remarks if r.pass_name == FuseNorms.name]


@pytest.mark.parametrize(("operator", "loops"), [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)])
def test_what_is_slower_than_the_loops_stays_out(
    clock: Clock, operator: float, loops: float
) -> None:
    clock.operator, clock.loops = operator, loops
    (remark,) = remarks_of(norm, *draw())
    assert (remark.kind.value == "applied") == (operator <= loops)
    assert ("loops run faster" in remark.text) == (operator > loops)


def test_a_pass_that_is_named_times_nothing(clock: Clock) -> None:
    clock.operator = 3.0
    (remark,) = remarks_of(norm, *draw(), passes={FuseNorms.name: True})
    assert remark.kind.value == "applied"
    assert clock.asked == []


def test_each_question_is_timed_once(clock: Clock) -> None:
    def times(*args: Tensor) -> int:
        before = len(clock.asked)
        remarks_of(norm, *args)
        return len(clock.asked) - before

    assert times(*draw()) == 2
    assert times(*draw()) == 0
    assert times(*draw(rows=7)) == 0  # of the same bucket
    assert times(*draw(rows=9)) == 2
    assert times(*draw(width=WIDTH + 1)) == 2
    assert times(*(t.to(torch.bfloat16) for t in draw())) == 2
    assert times(*(t.detach() for t in draw())) == 2


def test_without_memory_to_find_out_the_operator_moves_fewer_bytes(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(trial: Trial) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trial, "seconds", seconds)
    (remark,) = remarks_of(norm, *draw())
    assert remark.kind.value == "applied"


def test_both_trials_compute_what_the_graph_does(clock: Clock) -> None:
    x, weight = draw()
    residual = torch.randn_like(x)
    clock.operator = 3.0
    remarks_of(added_norm, x, residual, weight)
    assert len(clock.asked) == 2
    by_shape: dict[tuple[int, ...], list[Tensor]] = {(WIDTH,): [weight], (6, WIDTH): [x, residual]}
    for trial in clock.asked:
        waiting = {shape: [*values] for shape, values in by_shape.items()}
        inputs = [waiting[tuple(like.shape)].pop(0) for like in trial.inputs]
        results = fx.GraphModule({}, trial.graph)(*inputs)
        assert len(results) == 2
        for got, expected in zip(results, added_norm(x, residual, weight), strict=True):
            torch.testing.assert_close(got, expected)


def test_sizes_that_change_are_timed_as_traced(clock: Clock) -> None:
    torch._dynamo.reset()
    step = torch.compile(norm, backend="memopt", options={"lowering": "eager"})
    x, weight = draw()
    torch._dynamo.mark_dynamic(x, 0)
    step(x, weight)
    assert len(clock.asked) == 2


@pytest.mark.parametrize("budget", [None, 0.9])
def test_timing_while_compiling_disturbs_nothing(served: Path, budget: float | None) -> None:
    """Real seconds: two more graphs are compiled inside the compilation of the first."""
    torch._dynamo.reset()

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return F.dropout(norm(x, weight), 0.0).square().sum()

    options: Any = {"memory_budget": budget, "strict": True}
    compiled = torch.compile(step, backend="memopt", options=options)
    x, weight = (t.detach().double().requires_grad_() for t in draw(rows=64))
    before = torch.get_rng_state()
    value = compiled(x, weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(served.iterdir())
    expected = step(x, weight)
    assert_equal_in_float64(
        (value, *torch.autograd.grad(value, (x, weight))),
        (expected, *torch.autograd.grad(expected, (x, weight))),
    )
